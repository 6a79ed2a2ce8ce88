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
PEERS = {
    "fira FiraAdamW": FIRA,
    "pytorch_optimizer Fira": FIRA,
    "galore-torch GaLoreAdamW": "fullrank GaLoreAdamW",
    "apollo-torch APOLLOAdamW": "fullrank ApolloAdamW",
}
"""Published optimizers in step_time.py, and ours of the same method."""
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
    """The machine, how busy it was, precision and versions of a report, with a link to its file."""
    known, path, dtypes = report["environment"], report["path"], report["settings"]["dtype"]
    threads = "" if known["gpu"] else f", {known['threads']} threads"
    dtype = dtypes if isinstance(dtypes, str) else " and ".join(dtypes)
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items() if name != "fullrank")
    link = f"[`{path.name}`](../{path.relative_to(ROOT)})"
    return f"{known['gpu'] or known['cpu']}{threads}, {load(report)}; {dtype}; {versions}: {link}"


def load(report: Row) -> str:
    """What else the machine did: 1 is a core in use."""
    return f"load average {report['environment']['load_average_at_start']:.1f} at the start"


def times(number: float | None) -> str:
    """A ratio."""
    return "-" if number is None else f"{number:.2f}x" if number < 10 else f"{number:.0f}x"


def step_rows(report: Row) -> list[Row]:
    """Our optimizers' rows with the basis that each takes by default."""
    return [row for row in report["rows"] if OURS.get(row["case"]) == row["basis"]]


def shapes(report: Row, row: Row) -> str:
    """What was stepped."""
    return f"{row['size']}, {row['scope']}, {dtype_of(row, report)}"


def dtype_of(row: Row, report: Row) -> str:
    """The type of weights and gradients of a row."""
    return str(row.get("dtype", report["settings"]["dtype"]))


def step_time() -> str:
    """Every size, precision, rank and scope."""
    head = ["shapes", "rank", "optimizer", "step, ms", "of its bound", "a refreshing step, of a plain one"]
    head += ["a step at gap 200, ms", "of its bound", "of fused AdamW's, same type", "of fused AdamW's, all float32"]
    parts = []
    for report in reports("step_time"):
        rows = []
        for row in step_rows(report):
            bound = row["step_s"] / row["step_over_bound"]
            cells = [shapes(report, row), str(row["rank"]), f"`{row['case'].split()[1]}`"]
            cells += [f"{row['step_s'] * 1e3:.1f}", times(row["step_over_bound"])]
            cells += [times(1 + row["refresh_s"] / row["step_s"]), f"{row['amortised_s'] * 1e3:.1f}"]
            cells += [times(row["amortised_s"] / bound), times(row["amortised_over_adamw"])]
            rows.append([*cells, times(over_float32_adamw(row, dtype_of(row, report)))])
        parts.append(f"{where(report)}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def over_float32_adamw(row: Row, dtype: str) -> float | None:
    """A step over that of fused AdamW on float32 weights, gradients and states."""
    return row["amortised_over_adamw"] if dtype == "float32" else row.get("amortised_over_adamw_float32")


def peers() -> str:
    """Each published optimizer beside ours of the same method: as each is by default, and both by SVD."""
    head = ["shapes", "rank", "package", "its step at gap 200, ms", "over ours", "over ours, SVD in both"]
    parts = []
    for report in reports("step_time"):
        rows = []
        for row in report["rows"]:
            if row["case"] not in PEERS or row["basis"] != ("random" if is_random(row) else "svd"):
                continue
            name, optimizer = row["case"].split()
            cells = [shapes(report, row), str(row["rank"]), f"`{name}`, `{optimizer}`"]
            cells += [f"{row['amortised_s'] * 1e3:.1f}", times(over_ours(report, row)), times(both_by_svd(report, row))]
            rows.append(cells)
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def is_random(peer: Row) -> bool:
    """Whether a method projects at random by default, here and there."""
    return OURS[PEERS[peer["case"]]] == "random"


def over_ours(report: Row, peer: Row, basis: str = "") -> float:
    """A published optimizer's step, refreshes included, over ours with a basis (default: that of our class)."""
    case = PEERS[peer["case"]]
    ours = next(row for row in report["rows"] if is_beside(row, peer, case, basis or OURS[case]))
    return float(peer["amortised_s"] / ours["amortised_s"])


def both_by_svd(report: Row, peer: Row) -> float:
    """The same where each refreshes by SVD."""
    exact = next(row for row in report["rows"] if is_beside(row, peer, peer["case"], "svd"))
    return over_ours(report, exact, "svd")


def is_beside(row: Row, other: Row, case: str, basis: str) -> bool:
    """Whether a row is of this case and basis, timed together with another."""
    same = all(row.get(key) == other.get(key) for key in ("size", "dtype", "rank", "scope"))
    return same and (row["case"], row["basis"]) == (case, basis)


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
    whole = [report for report in reports("throughput") if report["overhead"]]
    found = [(report["environment"]["gpu"] or "CPU", report["overhead"]) for report in whole]
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
    """A step as a multiple of fused AdamW's of the same type, on whole models in the first rank of each size."""
    found: dict[str, str] = {}
    for report in reports("step_time"):
        device = report["environment"]["gpu"] or "CPU"
        for row in step_rows(report):
            if row["case"] == case and row["scope"] == "model":
                name = f"{row['size']}, {dtype_of(row, report)}, {device}"
                found.setdefault(name, times(row["amortised_over_adamw"]))
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
    return span(row[key] for row in rows if dtype_of(row, report) == dtype)


def fira_beside(package: str, basis: str, *, dtype: str = "float32") -> str:
    """The same of a package's step over ours with a basis."""
    report = next(reports("step_time"))
    rows = [row for row in report["rows"] if row["case"] == package and row["scope"] == "model"]
    return span(over_ours(report, row, basis) for row in rows if dtype_of(row, report) == dtype)


def span(numbers: Iterable[float]) -> str:
    """From the least to the most."""
    found = list(numbers)
    least, most = (f"{number:.1f}" for number in (min(found), max(found)))
    return least if least == most else f"{least} to {most}"


def blocks() -> dict[str, str]:
    """All that pages hold, by name."""
    return {
        "step-time": step_time(),
        "peers": peers(),
        "targets": targets(),
        "throughput": throughput(),
        "phases": phases(),
        "loop": loop(),
        "published": published(),
        "fira-at-published-batch": at_published_batch(),
        "fira-throughput": share("fira"),
        "throughput-load": load(next(reports("throughput"))),
        "fira-over-package": fira_beside("fira FiraAdamW", "power"),
        "fira-over-package-half": fira_beside("fira FiraAdamW", "power", dtype="bfloat16"),
        "fira-svd-over-package": fira_beside("fira FiraAdamW", "svd"),
        "fira-svd-over-package-half": fira_beside("fira FiraAdamW", "svd", dtype="bfloat16"),
        "fira-over-other": fira_beside("pytorch_optimizer Fira", "power"),
        "fira-over-other-half": fira_beside("pytorch_optimizer Fira", "power", dtype="bfloat16"),
        "fira-over-adamw": fira_against("amortised_over_adamw"),
        "fira-over-adamw-half": fira_against("amortised_over_adamw", dtype="bfloat16"),
        "fira-over-float32-adamw-half": fira_against("amortised_over_adamw_float32", dtype="bfloat16"),
        "fira-over-bound": fira_against("step_over_bound"),
        "fira-over-bound-half": fira_against("step_over_bound", dtype="bfloat16"),
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
