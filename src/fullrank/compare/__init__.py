"""Methods side by side: one model, one data order, one budget of tokens, and a grid of learning rates for each."""
