"""Draw the learning curves of one or several runs of prime.py into one PNG.

    pip install matplotlib
    python assets/plot.py runs/prime-1 runs/prime-2 runs/outcome-1 --out curves.png
    python assets/plot.py runs/* --keys prm/loss rollout/length

Runs that differ only in seed, output, resume and models at NAME-SEED/ are pooled; others are labelled by the options that differ.
"""
import argparse
import json
import math
from itertools import cycle
from pathlib import Path

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # of Okabe and Ito
MARKERS = ("o-", "s--", "^:", "D-.")  # of the held-out metrics, which share a panel

IGNORED = ("seed", "output", "resume")

def fail(message: str):
    argparse.ArgumentParser().exit(2, f"plot.py: {message}\n")

def read_run(folder: Path) -> tuple[dict, dict]:
    """A run's options, and its series: {key: {step: value}}."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8") + "\n"
        lines = [json.loads(line) for line in text[:text.rfind("}\n") + 1].splitlines()]  # without a torn last one
    except (OSError, ValueError) as e:
        fail(f"{folder} is not the folder of a run: {e}")
    series = {}
    for line in lines:
        step = line.pop("step", line.pop("sft/step", None))
        for key, value in line.items():
            if step is not None and isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(key, {})[step] = value
    return config, series or fail(f"{folder}: its metrics.jsonl holds no metrics yet")

def pool(folders: list[Path]):
    """Yield labels (a folder where many options differ), each with the series of the runs of equal options."""
    pools, runs = {}, [(folder, *read_run(folder)) for folder in folders]
    keys = set.intersection(*(set(config) for _, config, _ in runs)) - set(IGNORED)  # older runs lack newer options
    for folder, config, series in runs:
        paths = {key: str(config[key]).replace(f"-{config['seed']}/", "-SEED/") for key in ("model", "prm", "prm_ref")}
        options = tuple((key, str(value)) for key, value in sorted((config | paths).items()) if key in keys)
        pools.setdefault(options, []).append((str(folder), series))
    for options, runs in pools.items():
        label = ", ".join(f"{key} {value}" for key, value in options if any((key, value) not in o for o in pools))
        yield label if 0 < len(label) <= 60 else runs[0][0], [series for _, series in runs]

def choose_panels(runs: list[dict]) -> dict[str, list[str]]:
    """The keys of each panel, under its title."""
    panels = {}
    for key in sorted(set().union(*runs)):
        folder, _, metric = key.rpartition("/")
        if folder.startswith("eval/") and (metric == "greedy" or metric.startswith("avg@") and "_se" not in metric):
            panels.setdefault(f"held-out accuracy: {Path(folder).stem}", []).append(key)
    probed = all("prm/all_auc" in run for run in runs if "prm/auc" in run)  # else the two would be mixed
    auc = ("PRM AUC, all rollouts", "prm/all_auc") if probed else ("PRM AUC, kept rollouts", "prm/auc")
    usual = [("rollout accuracy", "rollout/accuracy"), auc, ("policy entropy", "policy/entropy")]
    return panels | {title: [key] for title, key in usual if any(key in run for run in runs)}

def draw(axes, series: list[dict], style: str, color: str, window: int) -> None:
    """One metric of pooled runs over the steps they all have: mean (faint), running mean, and its range over runs."""
    steps = sorted(set.intersection(*map(set, series)))
    values = [[run[step] for run in series] for step in steps]
    near = [values[max(0, i - window // 2):i + window // 2 + 1] for i in range(len(steps))]
    smooth = [[sum(run) / len(run) for run in zip(*rows)] for rows in near]
    if window > 1:
        axes.plot(steps, [sum(row) / len(row) for row in values], color=color, alpha=0.35, linewidth=0.8)
    axes.plot(steps, [sum(row) / len(row) for row in smooth], style, color=color, markersize=4.5)
    axes.fill_between(steps, list(map(min, smooth)), list(map(max, smooth)), color=color, alpha=0.18, linewidth=0)

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of prime.py")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--keys", nargs="+", default=[], metavar="KEY", help="metrics to draw, not the usual ones")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="names of the pools, in the order drawn")
    args = parser.parse_args()
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("pip install matplotlib")
    pools = list(pool(list({folder.resolve(): folder for folder in args.runs}.values())))
    labels = args.labels or [label for label, _ in pools]
    if len(labels) != len(pools):
        fail(f"--labels: {len(pools)} are needed, for {'; '.join(label for label, _ in pools)}")
    pools = [(label + (f" ({len(runs)} seeds)" if len(runs) > 1 else ""), runs) for label, (_, runs) in zip(labels, pools)]
    everything = [series for _, runs in pools for series in runs]
    panels = {key: [key] for key in args.keys} if args.keys else choose_panels(everything)
    present = sorted(set().union(*everything))
    absent = [key for key in args.keys if key not in present]
    if absent or not panels:
        fail(f"no run holds {' or '.join(absent) or 'a usual metric'}; --keys may be: {', '.join(present)}")
    width, height = min(2, len(panels)), (len(panels) + 1) // 2
    figure = Figure(figsize=(4.6 * width, 2.8 * height + 0.6), dpi=200, layout="constrained")
    for place, (title, keys) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(height, width, place, title=title)
        held_out, longest = keys[0].startswith("eval/"), max(len(run.get(keys[0], ())) for run in everything)
        window = 1 if held_out else min(15, longest // 12) | 1
        for key, style in zip(keys, cycle(MARKERS if held_out else ["-"])):
            axes.plot([], [], style, color="grey", label=key.rpartition("/")[2])
            for (_, runs), color in zip(pools, cycle(COLORS)):
                if any(key in run for run in runs):
                    draw(axes, [run[key] for run in runs if key in run], style, color, window)
        axes.set_xlabel("step" if window == 1 else f"step (thick line, band: running mean over {window})")
        axes.grid(alpha=0.25)
        if held_out:
            axes.legend(frameon=False)
    handles = [axes.plot([], [], color=color, label=label)[0] for (label, _), color in zip(pools, cycle(COLORS))]
    columns = max(1, 45 * width // max(len(label) + 6 for label, _ in pools))
    seeds = "lines: mean of the seeds, bands: from the least to the largest" if len(everything) > len(pools) else None
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, title=seeds)
    figure.savefig(args.out)
    print(f"wrote {args.out}")

if __name__ == "__main__":
    main()
