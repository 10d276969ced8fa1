"""Tables of the ablation study: `python assets/study.py [FOLDER]` reads the runs that study.sh left in FOLDER (default
runs/study), writes study.csv, a row a run, and curves.csv, a row an arm and step, beside this file, and prints the grid of
learning rates and a table with a row an arm. A run that ended early (no prompts within the filter) has steps, but no
accuracy at its end."""

import csv
import json
import re
import sys
from pathlib import Path
from statistics import fmean, median, stdev

COLUMNS = ("arm", "seed", "steps", "avg4_start", "avg4_end", "greedy_end", "accuracy_end", "accuracy_swing", "steps_to_outcome_only",
           "prm_auc_start", "prm_auc_end", "pair_accuracy_end", "seconds_rollout", "seconds_ref", "seconds_prm",
           "seconds_critic", "seconds_policy", "seconds_step")
SERIES = {"accuracy": "rollout/accuracy", "prm_auc": "prm/all_auc", "avg4": "eval/miniature-test/avg@4"}
CURVES = ("arm", "step", "seeds", *(name + suffix for name in SERIES for suffix in ("", "_sd")))

def smooth(steps, key):
    """The mean of a metric over each step and the four before it, where it was measured; None where it was not."""
    windows = ([step[key] for step in steps[max(0, i - 4):i + 1] if key in step] for i in range(len(steps)))
    return [fmean(window) if window else None for window in windows]

def read(folder):
    """A run: its row without the comparison, its steps, and its smoothed accuracy on fresh problems."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, first, last = [line for line in lines if line.get("step", 0) > 0], lines[0], lines[-1]
    accuracy, auc = smooth(steps, "rollout/accuracy"), smooth(steps, "prm/all_auc")
    swings = [a["rollout/accuracy"] - b for a, b in zip(steps[5:], accuracy[4:])]  # against the five steps before
    arm, _, seed = folder.name.rpartition("-")
    samples = next(key for key in first if key.startswith("eval/") and key.endswith("/avg@4"))
    row = {"arm": arm, "seed": int(seed), "steps": len(steps), "avg4_start": first[samples], "prm_auc_start": auc[min(9, len(auc) - 1)]}
    if (folder / "policy").exists():
        row |= {"avg4_end": last[samples], "greedy_end": last[samples.replace("avg@4", "greedy")], "accuracy_end": accuracy[-1],
                "accuracy_swing": stdev(swings), "prm_auc_end": auc[-1], "pair_accuracy_end": smooth(steps, "prm/all_pair_accuracy")[-1]}
    for phase in ("rollout", "ref", "prm", "critic", "policy", "step"):
        row["seconds_" + phase] = median(step["time/" + phase] for step in steps)
    return row, steps, accuracy

def baseline(arm):
    """The outcome-only arm of the same part of the study."""
    if arm.startswith("chains-"):
        return re.match(r"chains-\d+-(p128-|k8-|long-)?", arm)[0] + "outcome"
    if arm.startswith("four-updates"):
        return "four-updates-outcome"
    return "best-outcome" if arm.startswith("best-") else "outcome"

def cell(values):
    """Mean and spread of what is there."""
    values = [value for value in values if value is not None]
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}" if values else "-"

def write(name, columns, rows):
    """A file of comma-separated values beside this one."""
    with open(Path(__file__).with_name(name), "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()} for row in rows)

def main():
    """Write the files and print the tables."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/study")
    found = [read(folder) for folder in sorted(root.glob("*-[0-9]"))
             if (folder / "policy").exists() or Path(f"{folder}.ended").exists()]
    if not found:
        sys.exit(f"study.py: no finished run in {root}: bash assets/study.sh makes them")
    ends = {(row["arm"], row["seed"]): row["accuracy_end"] for row, _, _ in found if "accuracy_end" in row}
    grid, arms, curves = {}, {}, []
    for row, steps, accuracy in found:  # the first step that is as good as the outcome-only run at its end, on the same seed
        goal = ends.get((baseline(row["arm"]), row["seed"]), 2.0)
        row["steps_to_outcome_only"] = next((step for step, value in enumerate(accuracy, 1) if step > 4 and value >= goal), None)
        (grid if row["arm"].startswith("grid-") else arms).setdefault(row["arm"], []).append((row, steps))
    for arm, runs in arms.items():
        for step in range(max(len(steps) for _, steps in runs)):
            at = [steps[step] for _, steps in runs if step < len(steps)]
            values = {name: [s[key] for s in at if key in s] for name, key in SERIES.items()}
            curves.append({"arm": arm, "step": step + 1, "seeds": len(at)} | {name: fmean(v) for name, v in values.items() if v}
                          | {name + "_sd": stdev(v) for name, v in values.items() if len(v) > 1})
    write("study.csv", COLUMNS, (row for row, _, _ in found))
    write("curves.csv", CURVES, curves)
    print("grid of learning rates: avg@4 on miniature-val")
    for arm, runs in grid.items():
        ended = sum("avg4_end" not in row for row, _ in runs)
        print(f"{arm[5:]:28} {cell([row.get('avg4_end') for row, _ in runs])}" + f", {ended} ended" * (ended > 0))
    print("| arm | seeds | avg@4 | greedy | steps to outcome-only's end | PRM AUC, step 10 | at the end | s a step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for arm, runs in arms.items():
        rows = [row for row, _ in runs]
        reached = [row["steps_to_outcome_only"] for row in rows if row["steps_to_outcome_only"]]
        steps = f"{fmean(reached):.0f} ({len(reached)} of {len(rows)})" if reached else "never"
        print(f"| {arm} | {len(rows)} | {cell([r.get('avg4_end') for r in rows])} | {cell([r.get('greedy_end') for r in rows])} | {steps} | "
              f"{cell([r['prm_auc_start'] for r in rows])} | {cell([r.get('prm_auc_end') for r in rows])} | "
              f"{fmean(r['seconds_step'] for r in rows):.2f} |")

if __name__ == "__main__":
    main()
