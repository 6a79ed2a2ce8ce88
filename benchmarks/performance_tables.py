"""The tables and numbers of docs/performance.md, and of other pages that cite it, from the committed result files.

A page holds them between ``<!-- made: NAME -->`` and ``<!-- made -->``. This writes them anew, and the page's figures;
a test asserts that what stands there is what the files say.

    python benchmarks/performance_tables.py            # pages and figures
    python benchmarks/performance_tables.py --check    # whether the pages are up to date
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("docs/performance.md", "docs/choose.md", "docs/methods/fira.md", "README.md")
MADE = re.compile(r"(<!-- made: ([\w-]+) -->)(.*?)(<!-- made -->)", re.DOTALL)
OURS = {"fullrank FiraAdamW": "power", "fullrank GaLoreAdamW": "power", "fullrank ApolloAdamW": "random"}
"""Our optimizers in step_time.py, each with the basis that it takes by default."""
FIRA = "fullrank FiraAdamW"
Row = dict[str, Any]


def reports(bench: str) -> Iterator[Row]:
    """The result files of a benchmark, those of CPUs first."""
    paths = sorted(RESULTS.glob(f"{bench}_*_[0-9][0-9][0-9][0-9][0-9][0-9].json"))
    found = [json.loads(path.read_text(encoding="utf-8")) | {"path": path} for path in paths]
    return iter(sorted(found, key=lambda report: report["environment"]["gpu"] is not None))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    names = list(head)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(report: Row) -> str:
    """The machine and the precision of a report, with a link to its file."""
    known, path, dtypes = report["environment"], report["path"], report["settings"]["dtype"]
    threads = "" if known["gpu"] else f", {known['threads']} threads"
    dtype = dtypes if isinstance(dtypes, str) else " and ".join(dtypes)
    link = f"[`{path.name}`](../{path.relative_to(ROOT)})"
    return f"{known['gpu'] or known['cpu']}{threads}, {dtype}, torch {known['versions']['torch']}: {link}"


def times(number: float | None) -> str:
    """A ratio."""
    return "-" if number is None else f"{number:.2f}x" if number < 10 else f"{number:.0f}x"


def step_rows(report: Row) -> list[Row]:
    """Our optimizers' rows with the basis that each takes by default."""
    return [row for row in report["rows"] if OURS.get(row["case"]) == row["basis"]]


def over_adamw(row: Row) -> float:
    """A step with its share of a refresh over fused AdamW's with float32 states."""
    return float(row.get("amortised_over_adamw_float32", row["amortised_over_adamw"]))


def step_time() -> str:
    """Every size, precision, rank and scope."""
    head = ["shapes", "rank", "optimizer", "step, ms", "of its bound", "a refreshing step, of a plain one"]
    head += ["a step at gap 200, ms", "of its bound", "of fused AdamW's", "authors' package over ours"]
    parts = []
    for report in reports("step_time"):
        rows = []
        for row in step_rows(report):
            dtype = row.get("dtype", report["settings"]["dtype"])
            bound = row["step_s"] / row["step_over_bound"]
            cells = [f"{row['size']}, {row['scope']}, {dtype}", str(row["rank"]), f"`{row['case'].split()[1]}`"]
            cells += [f"{row['step_s'] * 1e3:.1f}", times(row["step_over_bound"])]
            cells += [times(1 + row["refresh_s"] / row["step_s"]), f"{row['amortised_s'] * 1e3:.1f}"]
            cells += [times(row["amortised_s"] / bound), times(over_adamw(row))]
            rows.append([*cells, times(row["authors_amortised_over_this"])])
        parts.append(f"{where(report)}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def targets() -> str:
    """What the steps of Fira were to reach, and whether they did."""
    rows = []
    for report in reports("step_time"):
        device = report["environment"]["gpu"] or "CPU"
        for target in report.get("targets", ()):
            reached = "yes" if target["reached"] else "no"
            rows.append([target["of"], device, target["target"], target["wanted"], f"{target['found']:.2f}", reached])
    if not rows:
        return "The committed results are older than the targets."
    return table(["of", "on", "target", "wanted", "found", "reached"], rows)


def throughput() -> str:
    """Every run of every size."""
    head = ["run", "step, ms", "a refresh or restart adds, ms", "tokens/s", "of full AdamW's", "quartiles"]
    parts = []
    for report in reports("throughput"):
        for size in report["sizes"]:
            rows = [
                [
                    row["case"],
                    f"{row['step_s'] * 1e3:.0f}",
                    f"{row['event_extra_s'] * 1e3:.0f}" if row["events_timed"] else "-",
                    f"{row['tokens_per_s']:,.0f}",
                    f"{row['ratio']:.1%}",
                    f"{row['ratio_quartiles'][0]:.1%} to {row['ratio_quartiles'][1]:.1%}",
                ]
                for row in size["rows"]
            ]
            title = (
                f"LLaMA {size['size']}, rank {size['rank']}, {size['tokens_per_step']:,} tokens a step; {where(report)}"
            )
            parts.append(f"{title}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def phases() -> str:
    """Where a step's time goes, of full AdamW and of Fira."""
    parts = ["data", "forward", "backward and clipping", "optimizer", "logging and callbacks"]
    rows = []
    for report in reports("throughput"):
        for size in report["sizes"]:
            for row in size["phases"]:
                total = sum(row[name] for name in parts)
                cells = [f"{row[name] * 1e3:.1f} ({row[name] / total:.1%})" for name in parts]
                device = report["environment"]["gpu"] or "CPU"
                rows.append([f"{size['size']}, {device}", row["case"], *cells])
    return table(["model", "method", *(f"{name}, ms" for name in parts)], rows)


def loop() -> str:
    """The loops around a network that takes no time."""
    found = [(report["environment"]["gpu"] or "CPU", report["overhead"]) for report in reports("throughput")]
    names = [row["loop"] for row in found[0][1]]
    by_name = [{row["loop"]: row["step_ms"] for row in rows} for _, rows in found]
    head = ["loop", *(f"ms a step, {device}" for device, _ in found)]
    return table(head, [[name, *(f"{rows[name]:.2f}" for rows in by_name)] for name in names])


def share(case: str) -> str:
    """The measured share of full AdamW's throughput of a case, at every size."""
    found = []
    for report in reports("throughput"):
        device = report["environment"]["gpu"] or "CPU"
        for size in report["sizes"]:
            ratio = next((row["ratio"] for row in size["rows"] if row["case"] == case), None)
            if ratio is not None:
                found.append(f"{ratio:.1%} ({size['size']}, {size['tokens_per_step']:,} tokens a step, {device})")
    return "; ".join(found)


def at_published_batch() -> str:
    """Fira's share with the papers' batch, computed."""
    found = [
        f"{size['fira_at_published_batch']:.1%} ({size['size']}, {report['environment']['gpu'] or 'CPU'})"
        for report in reports("throughput")
        for size in report["sizes"]
    ]
    return "; ".join(found)


def steps_over_adamw(case: str) -> str:
    """A step as a multiple of fused AdamW's, on whole models in the first precision and rank of each size."""
    found: dict[str, str] = {}
    for report in reports("step_time"):
        device = report["environment"]["gpu"] or "CPU"
        for row in step_rows(report):
            if row["case"] == case and row["scope"] == "model":
                found.setdefault(f"{row['size']}, {device}", times(over_adamw(row)))
    return "; ".join(f"{ratio} ({where})" for where, ratio in found.items())


def published() -> str:
    """What the papers print, beside what we measured."""
    rows = [
        ["Fira, tokens/s of full-rank's, 1B", "94.2%", share("fira")],
        ["GaLore, the same", "95.9%", share("galore")],
        ["LoRA, the same", "67.4%", share("lora")],
        ["ReLoRA, the same", "67.4%", share("relora")],
        ["Fira's optimizer step over AdamW's, 1B and 7B", "11.7x, 17.8x", steps_over_adamw(FIRA)],
        ["GaLore's, the same", "10.3x, 16.6x", steps_over_adamw("fullrank GaLoreAdamW")],
        ["APOLLO's, the same", "1.4x, 0.9x", steps_over_adamw("fullrank ApolloAdamW")],
    ]
    return table(["what", "paper", "here"], rows)


def fira_against(key: str, *, dtype: str = "float32", case: str = FIRA) -> str:
    """The range of a ratio of Fira's step over the sizes of the first report, on whole models in one type."""
    report = next(reports("step_time"))
    rows = step_rows(report) if case == FIRA else report["rows"]
    rows = [row for row in rows if row["case"] == case and row["scope"] == "model"]
    found = [row[key] for row in rows if row.get("dtype", "float32") == dtype]
    least, most = (f"{number:.1f}" for number in (min(found), max(found)))
    return least if least == most else f"{least} to {most}"


def blocks() -> dict[str, str]:
    """All that pages hold, by name."""
    return {
        "step-time": step_time(),
        "targets": targets(),
        "throughput": throughput(),
        "phases": phases(),
        "loop": loop(),
        "published": published(),
        "fira-at-published-batch": at_published_batch(),
        "fira-throughput": share("fira"),
        "fira-over-package": fira_against("authors_amortised_over_this"),
        "fira-over-adamw": fira_against("amortised_over_adamw"),
        "fira-over-bound": fira_against("step_over_bound"),
        "fira-over-bound-half": fira_against("step_over_bound", dtype="bfloat16"),
        "fira-over-package-half": fira_against("authors_amortised_over_this", dtype="bfloat16"),
        "package-over-bound": fira_against("step_over_bound", case="fira FiraAdamW"),
    }


def filled(text: str, made: dict[str, str]) -> str:
    """A page with what it holds written anew; tables stand between empty lines."""

    def fill(match: re.Match[str]) -> str:
        content = made[match[2]]
        return f"{match[1]}\n\n{content}\n\n{match[4]}" if "\n" in content else f"{match[1]}{content}{match[4]}"

    return MADE.sub(fill, text)


def main() -> None:
    """Write the pages and figures, or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    options = parser.parse_args()
    made = blocks()
    for name in PAGES:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        if (new := filled(old, made)) != old:
            print(f"{name} is out of date" if options.check else f"wrote {name}")
            if options.check:
                raise SystemExit(1)
            path.write_text(new, encoding="utf-8")
    if not options.check:
        from performance_figures import draw

        for path in draw(list(reports("step_time")), list(reports("throughput"))):
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
