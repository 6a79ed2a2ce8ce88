// Runs before the page is painted: the colours that were chosen last time.
"use strict";
document.documentElement.classList.add("script");
try {
  const theme = localStorage.getItem("fullrank-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* a browser may keep nothing for files */ }
