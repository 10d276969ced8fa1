"""Longer miniatures: `python assets/chains.py FOLDER LENGTH SEED [WRONG BELIEF SLIP]` writes train.jsonl, test.jsonl and
sft.jsonl of chains of LENGTH operations, and init/, a randomly initialised model, for prime.py's --data, --eval-data,
--sft-data and --model. The teacher of sft.jsonl believes a share WRONG of the 300 facts wrongly and writes what it
believes with probability BELIEF; elsewhere it slips with probability SLIP."""
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prime

def write(path: Path, rows: list[dict]) -> None:
    """A line of JSON a row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

if __name__ == "__main__":
    folder, length, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    teacher = dict(zip(("wrong", "belief", "slip"), map(float, sys.argv[4:])))
    folder.mkdir(parents=True, exist_ok=True)
    questions = list(dict.fromkeys(itertools.islice(prime.miniature_questions("chains", length), 20512)))
    rows = [{"prompt": q, "answer": prime.miniature_solution(q)[-1][-1]} for q in questions]
    write(folder / "test.jsonl", rows[:512])
    write(folder / "train.jsonl", rows[512:])
    write(folder / "sft.jsonl", prime.miniature_sft_rows(seed, 201600 // length, length, **teacher))
    prime.make_miniature_model(folder / "init", seed)
