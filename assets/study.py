"""Tables of the ablation study: `python assets/study.py [FOLDER]` reads the finished runs that study.sh left in
FOLDER (default runs/study), writes assets/study.csv with a row a run and prints a table with a row an arm."""

import csv
import json
import sys
from pathlib import Path
from statistics import fmean, stdev

COLUMNS = ("arm", "seed", "avg4_start", "avg4_end", "greedy_end", "rollout_accuracy_end", "steps_to_outcome_only",
           "prm_auc_start", "prm_auc_end", "pair_accuracy_end", "seconds_rollout", "seconds_ref", "seconds_prm",
           "seconds_policy", "seconds_step")

def smooth(steps, key):
    """The mean of a metric over each step and the four before it; empty where a step lacks it."""
    values = [step.get(key) for step in steps]
    if None in values:
        return []
    return [fmean(values[max(0, i - 4):i + 1]) for i in range(len(values))]

def read(folder):
    """A finished run: its row without the comparison, and its smoothed accuracy on fresh problems by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, first, last = [line for line in lines if line.get("step", 0) > 0], lines[0], lines[-1]
    accuracy, auc = smooth(steps, "rollout/accuracy"), smooth(steps, "prm/all_auc")
    pairs = smooth(steps, "prm/all_pair_accuracy")
    arm, _, seed = folder.name.rpartition("-")
    row = {"arm": arm, "seed": int(seed), "avg4_start": first["eval/miniature-test/avg@4"],
           "avg4_end": last["eval/miniature-test/avg@4"], "greedy_end": last["eval/miniature-test/greedy"],
           "rollout_accuracy_end": accuracy[-1], "prm_auc_start": auc[9] if len(auc) > 9 else "",
           "prm_auc_end": auc[-1] if auc else "", "pair_accuracy_end": pairs[-1] if pairs else ""}
    for phase in ("rollout", "ref", "prm", "policy", "step"):
        row["seconds_" + phase] = fmean(step["time/" + phase] for step in steps)
    return row, accuracy

def cell(values):
    """Mean and spread of what is there."""
    values = [value for value in values if value != ""]
    if not values:
        return "-"
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"

def main():
    """Write assets/study.csv and print the table."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/study")
    found = [read(path.parent) for path in sorted(root.glob("*/policy"))]
    baselines = {row["seed"]: row["rollout_accuracy_end"] for row, _ in found if row["arm"] == "outcome"}
    for row, accuracy in found:  # the first step that is as good as the outcome-only run at its end, on the same seed
        goal = baselines.get(row["seed"], 2.0)
        row["steps_to_outcome_only"] = next((step for step, value in enumerate(accuracy, 1) if step > 4 and value >= goal), "")
    with open(Path(__file__).with_name("study.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
                         for row, _ in found)
    print("| arm | seeds | avg@4 | greedy | steps to outcome-only's end | PRM AUC, step 10 | at the end | s a step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for arm in dict.fromkeys(row["arm"] for row, _ in found):
        rows = [row for row, _ in found if row["arm"] == arm]
        reached = [row["steps_to_outcome_only"] for row in rows if row["steps_to_outcome_only"] != ""]
        steps = f"{fmean(reached):.0f} ({len(reached)} of {len(rows)})" if reached else "never"
        print(f"| {arm} | {len(rows)} | {cell([r['avg4_end'] for r in rows])} | {cell([r['greedy_end'] for r in rows])} | {steps} | "
              f"{cell([r['prm_auc_start'] for r in rows])} | {cell([r['prm_auc_end'] for r in rows])} | "
              f"{fmean(r['seconds_step'] for r in rows):.2f} |")

if __name__ == "__main__":
    main()
