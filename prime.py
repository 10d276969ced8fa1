"""PRIME: Process Reinforcement through Implicit Rewards (arXiv 2502.01456), in one file.

    python prime.py                                   # the paper in miniature: minutes on a laptop, no GPU, no network
    torchrun --nproc-per-node 8 prime.py --model PRIME-RL/Eurus-2-7B-SFT --data PRIME-RL/Eurus-2-RL-Data
    python prime.py --resume runs/NAME                # go on after a kill

Algorithm 1, as `train` runs it. Policy pi_theta, implicit PRM pi_phi and reference pi_ref start from one SFT model.

    for each step
        sample K responses a prompt, verify their outcomes r_o                      collect_rollouts
        keep prompts of middling accuracy, draw until the batch is full             accuracy_filter
        r_phi(y_t) = beta * log(pi_phi(y_t) / pi_ref(y_t))                    Eq. 3 implicit_rewards
        update pi_phi by cross-entropy on the outcomes                             prm_loss, score_and_update_prm
        A_t = leave-one-out returns of r_phi + leave-one-out r_o              Eq. 5 rloo_advantages
        update pi_theta by PPO's clipped loss                                 Eq. 6 ppo_loss, update_policy

The file reads as the paper does: options, problems, models, rollout, implicit process reward, advantages, policy
update, then what surrounds them (SFT, evaluation, checkpoints), `train` and the command line. The mathematics are pure
functions of tensors; devices, ranks and engines appear in the sections on models and rollout only.

Shapes: B = P * K responses, the K responses of a prompt next to each other; T response positions; mask (B, T) is 1 on
response tokens, the end-of-sequence token included.
"""

import argparse
import contextlib
import dataclasses
import html
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Iterable, Iterator, Literal, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import verify

# ----------------------------------------------------------------------------------------------------------------------
# Options: one dataclass a section of --help. The defaults are the paper's main experiment (Sec. 4, App. D); where the
# paper is silent, the official run script's, which the help then calls "official code".


def opt(default, text):
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelOptions:
    _argument_group_name = "models"
    model: Optional[str] = opt(None, "SFT model all three models start from: hub id or folder (paper: Eurus-2-7B-SFT)")
    prm: Optional[str] = opt(None, "other initialisation of the PRM (paper Sec. 5: the SFT model is best)")
    prm_ref: str = opt("sft", "reference of Eq. 3: 'sft' (frozen), 'policy' (its old log-probabilities; saves a model), "
                              "with --eval-only a folder (Sec. 5)")
    dtype: Literal["bfloat16", "float32"] = opt("bfloat16", "compute dtype; weights and Adam stay float32 (official code)")
    activation_checkpointing: bool = opt(False, "recompute activations: less memory, about a third slower")
    cpu_offload: bool = opt(False, "parameters, gradients and Adam states in host memory (official code: on)")
    token_budget: int = opt(16384, "tokens of one micro-batch on one rank; a longer response goes alone")


@dataclass
class DataOptions:
    _argument_group_name = "data"
    data: Optional[str] = opt(None, "RL prompts: hub id, .parquet, .jsonl, or 'miniature' (paper: Eurus-2-RL-Data)")
    eval_data: Optional[list[str]] = field(default=None, metadata={"help": "held-out sets, named like --data"})
    template: Literal["chat", "zero", "none"] = opt("chat", "prompt format: the model's chat template; 'zero': a plain "
                                                            "one for base models (Sec. 5); 'none': the text itself")
    system_prompt: Optional[str] = opt(None, "system message for plain rows (chat rows hold their own)")
    prompt_suffix: Optional[str] = opt(None, "added to plain rows (default: ask for \\boxed{} or a python block)")
    max_prompt_tokens: int = opt(1024, "longer prompts are dropped and counted (official code)")
    max_response_tokens: int = opt(3072, "responses are cut here (official code)")


@dataclass
class RolloutOptions:
    _argument_group_name = "rollout (Sec. 3, 4)"
    rollout: Literal["auto", "vllm", "hf"] = opt("auto", "engine; auto: vLLM where CUDA and vllm are there, else hf")
    prompts_per_step: int = opt(256, "prompts kept a step (Sec. 4)")
    group_size: int = opt(4, "K, responses a prompt (Sec. 4)")
    temperature: float = opt(1.0, "of sampling (official code)")
    filter: bool = opt(True, "online prompt filter (Sec. 3)")
    filter_low: float = opt(0.2, "least mean accuracy of a group, inclusive (official code)")
    filter_high: float = opt(0.8, "largest mean accuracy of a group, inclusive (official code)")
    drop_truncated: bool = opt(False, "also drop groups with a truncated response (official code: off)")
    max_draws: int = opt(20, "give up when a step has drawn this many times --prompts-per-step")
    rollout_batch: int = opt(256, "hf engine: sequences decoded at once")
    vllm_memory: float = opt(0.6, "vLLM engine: share of the GPU's memory (official code: 0.7)")
    importance_cap: float = opt(0.0, "C > 0: weigh tokens by min(pi_trainer / pi_engine, C); 0: off (as published)")
    verify_workers: Optional[int] = opt(None, "verifier processes a rank (default: the cores, shared by the ranks)")
    verify_timeout: float = opt(6.0, "seconds a test or an answer (official code)")
    sandbox: Literal["auto", "bwrap", "limits"] = opt("auto", "isolation of programs: auto needs bubblewrap to work")


@dataclass
class RewardOptions:
    _argument_group_name = "reward and advantage (Sec. 3)"
    reward: Literal["prime", "outcome", "process"] = opt("prime", "which rewards enter; outcome: the RLOO baseline")
    beta: float = opt(0.05, "scale of the implicit reward, Eq. 3 (Sec. 4)")
    gamma: float = opt(1.0, "discount of process rewards, Eq. 5; the outcome is never discounted (official code)")
    process_weight: float = opt(1.0, "factor of the process part of the advantage")
    outcome_weight: float = opt(1.0, "factor of the outcome part of the advantage")
    estimator: Literal["rloo", "reinforce", "grpo", "ppo"] = opt("rloo", "advantage estimator (Eq. 5, 7, 8; Table 4)")
    process_baseline: Literal["token-mean", "official"] = opt("token-mean", "rloo: Eq. 5's text, or the official "
                                                              "code's K/(K-1) form")
    granularity: Literal["token", "whole"] = opt("token", "process reward a token, or R_phi(y) as a second outcome")
    prm_role: Literal["reward", "value"] = opt("reward", "value: A_t = r_o - v_phi(y_<t) (Sec. 5)")
    normalize: bool = opt(True, "divide process rewards by the batch's largest |reward-to-go| (official code)")
    whiten: bool = opt(True, "whiten advantages over the batch's tokens (official code)")


@dataclass
class PRMOptions:
    _argument_group_name = "implicit PRM (Sec. 3, 5)"
    prm_lr: float = opt(1e-6, "constant learning rate (Sec. 4)")
    prm_weight_decay: float = opt(0.0, "of AdamW (official code)")
    prm_grad_clip: float = opt(10.0, "largest gradient norm (official code; norms near 20 are normal at first)")
    prm_minibatch: int = opt(256, "responses an update, whole groups (Sec. 4: 4 updates a step)")
    prm_update: Literal["single", "score-first", "double", "none"] = opt(
        "single", "single: each minibatch is scored by its training forward; score-first: all are scored before any "
                  "update; double: update, then rescore; none: frozen, offline PRM (Sec. 5)")
    prm_loss: Literal["ce", "dpo"] = opt("ce", "cross-entropy, or DPO on the pairs of a group (Table 8)")
    prm_warmup_steps: int = opt(0, "first steps train the PRM only, the policy held")
    prm_probe_every: int = opt(0, "every N steps score all rollouts, before filter and update (0: kept ones only)")


@dataclass
class PolicyOptions:
    _argument_group_name = "policy update (Sec. 3.2)"
    lr: float = opt(5e-7, "constant learning rate (Sec. 4)")
    weight_decay: float = opt(0.01, "of AdamW (official code)")
    grad_clip: float = opt(1.0, "largest gradient norm (official code)")
    minibatch: int = opt(256, "responses an update, shuffled (Sec. 4: 4 updates a step)")
    ppo_epochs: int = opt(1, "passes over a batch (official code)")
    clip: float = opt(0.2, "epsilon of Eq. 6 (official code)")
    loss_average: Literal["token", "sequence"] = opt("token", "over the minibatch's tokens; sequence: over responses of "
                                                              "their token means (official code)")
    lam: float = opt(1.0, "lambda of GAE, --estimator ppo (Sec. 5)")
    critic_lr: float = opt(1e-5, "--estimator ppo: learning rate of the critic (not published)")


@dataclass
class SFTOptions:
    _argument_group_name = "SFT warm-up (App. D)"
    sft_data: Optional[str] = opt(None, "train --model on this first: Eurus-2-SFT-Data's schema, or prompt and response")
    sft_epochs: int = opt(3, "passes over it (App. D)")
    sft_batch: int = opt(96, "examples an update (App. D)")
    sft_lr: float = opt(1e-5, "peak learning rate: 10% warm-up, then cosine (App. D)")
    sft_weight_decay: float = opt(0.0, "of AdamW (not published)")
    sft_max_tokens: int = opt(6144, "longer examples are dropped and counted (official code)")


@dataclass
class RunOptions:
    _argument_group_name = "run and evaluation"
    output: Optional[str] = opt(None, "run folder (default: runs/DATE-TIME)")
    resume: Optional[str] = opt(None, "run folder to go on with")
    steps: int = opt(592, "rollout steps (Table 1); 0: SFT or nothing, then the end")
    seed: int = opt(42, "of prompts, sampling and shuffling")
    save_every: int = opt(16, "steps between checkpoints (official code)")
    eval_every: int = opt(16, "steps between evaluations, 0: only first and last (official code)")
    eval_only: bool = opt(False, "evaluate --model on --eval-data, train nothing")
    eval_samples: int = opt(0, "besides greedy: N samples a problem for avg@N, pass@k, majority (Table 12: 16)")
    eval_temperature: float = opt(0.3, "of those samples (Table 12)")
    inspect: bool = opt(False, "each evaluation writes a page that shades tokens by their process reward")
    report_to: Literal["none", "tensorboard", "wandb"] = opt("none", "besides metrics.jsonl")


SECTIONS = (ModelOptions, DataOptions, RolloutOptions, RewardOptions, PRMOptions, PolicyOptions, SFTOptions, RunOptions)


@dataclass
class Config(*SECTIONS):
    """All options, flat."""


# The built-in experiment: what differs from the paper's values when --data is absent or 'miniature'.
MINIATURE = dict(
    data="miniature", eval_data=["miniature-test"], template="none", max_prompt_tokens=16, max_response_tokens=48,
    dtype="float32", rollout="hf", rollout_batch=512, prompts_per_step=32, minibatch=128, prm_minibatch=128,
    lr=1e-4, prm_lr=2e-4, critic_lr=2e-4, steps=60, save_every=20, eval_every=0, eval_samples=4, eval_temperature=1.0,
    prm_probe_every=1, verify_workers=1)
# ... and without --model the SFT model is made first, from nothing.
MINIATURE_SFT = dict(sft_data="miniature", sft_epochs=1, sft_batch=48, sft_lr=3e-3)


class UserError(Exception):
    """A mistake of the user's: one line that names the option and what would be right; exit code 2."""


def check_config(cfg: Config, world: int) -> None:
    """Raise UserError for values that cannot work, alone or together."""
    for name in ("prompts_per_step", "group_size", "minibatch", "prm_minibatch", "token_budget", "max_response_tokens",
                 "max_prompt_tokens", "ppo_epochs", "rollout_batch", "sft_batch", "sft_epochs", "max_draws"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(cfg, name)}")
    for name in ("steps", "save_every", "eval_every", "eval_samples", "prm_warmup_steps", "prm_probe_every", "lr",
                 "prm_lr", "critic_lr", "sft_lr", "beta", "temperature", "importance_cap", "eval_temperature"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must not be negative or infinite, not {getattr(cfg, name)}")
    if not 0 <= cfg.gamma <= 1 or not 0 <= cfg.lam <= 1:
        raise UserError("--gamma and --lam lie between 0 and 1")
    if cfg.data is None and not cfg.eval_only and cfg.steps:
        raise UserError("--data is missing: name the RL prompts, or give --steps 0 to stop after SFT")
    if cfg.model is None and (cfg.sft_data != "miniature" or cfg.data not in (None, "miniature")):
        raise UserError("--model is missing: name the SFT model to start from (hub id or folder)")
    if cfg.eval_only and not cfg.eval_data:
        raise UserError("--eval-only needs --eval-data: name one or several sets")
    if cfg.eval_only:
        return
    if cfg.group_size < 2 and cfg.estimator in ("rloo", "grpo"):
        raise UserError(f"--group-size 1 leaves nothing to leave out: --estimator {cfg.estimator} needs at least 2")
    if cfg.temperature == 0:
        raise UserError("--temperature 0 samples the same response K times: give a positive one")
    if not 0 <= cfg.filter_low <= cfg.filter_high <= 1:
        raise UserError("--filter-low and --filter-high must satisfy 0 <= low <= high <= 1")
    batch = cfg.prompts_per_step * cfg.group_size
    for name in ("minibatch", "prm_minibatch"):
        size, flag = getattr(cfg, name), "--" + name.replace("_", "-")
        if batch % size:
            raise UserError(f"{flag} {size} does not divide the batch of {batch} responses "
                            "(--prompts-per-step times --group-size)")
        if size % world:
            raise UserError(f"{flag} {size} cannot be dealt evenly to {world} processes: choose a multiple of {world}")
    if cfg.prm_minibatch % cfg.group_size:
        raise UserError(f"--prm-minibatch {cfg.prm_minibatch} splits groups: choose a multiple of --group-size")
    if cfg.sft_data and cfg.sft_batch % world:
        raise UserError(f"--sft-batch {cfg.sft_batch} cannot be dealt evenly to {world} processes")
    clashes = [
        (cfg.prm_ref not in ("sft", "policy"), "--prm-ref is 'sft' or 'policy' in training"),
        (cfg.prm_ref == "policy" and cfg.temperature != 1, "--prm-ref policy needs --temperature 1"),
        (cfg.process_baseline != "token-mean" and cfg.estimator != "rloo", "--process-baseline belongs to rloo"),
        (cfg.prm_update == "none" and cfg.prm_loss == "dpo", "--prm-loss does nothing with --prm-update none"),
        (cfg.prm_update == "none" and cfg.prm_warmup_steps > 0, "--prm-warmup-steps needs a PRM that is updated"),
        (cfg.prm_update == "none" and cfg.prm is None and cfg.reward != "outcome",
         "--prm-update none with the SFT model as PRM rewards nothing: name another --prm"),
        (cfg.prm_loss == "dpo" and cfg.group_size < 2, "--prm-loss dpo pairs the responses of a group: --group-size 2"),
        (cfg.prm_role == "value" and (cfg.reward != "prime" or cfg.estimator != "rloo" or cfg.granularity != "token"),
         "--prm-role value replaces the estimator: leave --reward, --estimator and --granularity alone"),
        (cfg.granularity == "whole" and cfg.gamma != 1, "--granularity whole knows no --gamma"),
        (cfg.reward == "outcome" and (cfg.prm or cfg.prm_ref != "sft" or cfg.prm_update != "single"
                                      or cfg.prm_loss != "ce" or cfg.prm_warmup_steps or cfg.granularity != "token"),
         "--reward outcome has no PRM: drop --prm, --prm-ref, --prm-update, --prm-loss, --prm-warmup-steps, --granularity"),
    ]
    for wrong, message in clashes:
        if wrong:
            raise UserError(message)


# ----------------------------------------------------------------------------------------------------------------------
# Problems: a prompt, and what its responses are verified against.

MATH_SUFFIX = "\n\nPresent the answer in LaTeX format: \\boxed{Your answer}"
CODE_SUFFIX = "\n\nWrite Python code to solve the problem. Present the code in a ```python fenced block at the end."
ZERO_TEMPLATE = ("A conversation between User and Assistant. The Assistant first thinks inside <think> </think> tags, "
                 "then answers inside <answer> </answer> tags. User: {question}\nAssistant: ")


@dataclass
class Problem:
    """A prompt (chat messages, or plain text), its verifier ("math" or "code") and that verifier's reference."""
    prompt: list | str
    task: str
    reference: object


def problem_from_row(row: dict, where: str, suffix: Optional[str] = None) -> Problem:
    """Understand one data row: Eurus-2-RL-Data's schema, plain columns, or those of the usual benchmarks.

    where: names the row in the UserError raised if it has no prompt or no answer.
    """
    def first(*names):
        return next((row[n] for n in names if row.get(n) not in (None, "", [])), None)

    prompt = first("problem", "question", "prompt", "instruction", "question_content")
    if prompt is None:
        raise UserError(f"{where}: no prompt (a column problem, question or prompt)")
    if isinstance(row.get("reward_model"), dict):  # Eurus-2-RL-Data
        task, reference = row.get("ability", "math"), row["reward_model"].get("ground_truth")
    elif first("tests", "input_output") is not None:
        task, reference = "code", first("tests", "input_output")
    elif isinstance(row.get("test"), str):  # LeetCode, HumanEval: a script of assertions
        task, reference = "code", {"asserts": row["test"]}
    else:
        task, reference = "math", first("answer", "expected_answer", "final_answer", "reference")
        if isinstance(reference, list):  # OlympiadBench
            reference = ", ".join(map(str, reference))
        if reference is None and isinstance(row.get("solution"), str):  # MATH, Minerva: in the worked solution
            reference = verify.extract_answer(row["solution"])
        reference = None if reference is None else str(reference)
    if reference is None or task not in ("math", "code"):
        raise UserError(f"{where}: no answer (a column answer, tests or reward_model), or an ability that is neither "
                        "math nor code")
    if isinstance(prompt, list):
        if not all(isinstance(m, dict) and "role" in m and "content" in m for m in prompt):
            raise UserError(f"{where}: a chat prompt is a list of messages with role and content")
        return Problem(prompt, task, reference)
    if suffix is None:
        suffix = MATH_SUFFIX if task == "math" else CODE_SUFFIX
    return Problem(str(prompt) + suffix, task, reference)


def load_rows(name: str, split: str, option: str):
    """The rows of a .jsonl or .parquet file or of a hub data set: a list of dicts, or an Arrow table of them."""
    if name.endswith((".jsonl", ".json")):
        if not os.path.isfile(name):
            raise UserError(f"{option}: no file {name}")
        rows = []
        for number, line in enumerate(open(name, encoding="utf-8"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise ValueError("not an object")
                except ValueError as e:
                    raise UserError(f"{name}, line {number}: not a JSON object ({e})") from None
        return rows
    try:
        import datasets
    except ImportError:
        raise UserError(f"{option} {name}: pip install datasets, or give a .jsonl file") from None
    try:
        if name.endswith(".parquet"):
            return datasets.Dataset.from_parquet(name)
        return datasets.load_dataset(name, split=split)
    except Exception as e:  # the hub client raises dozens of kinds
        raise UserError(f"{option}: cannot load {name} ({str(e).splitlines()[0][:200]})") from None


class Problems:
    """A sequence of Problem over the rows of one data set, converted when asked for."""

    def __init__(self, name: str, cfg: Config, split: str = "train", option: str = "--data"):
        self.name, self.suffix = name, cfg.prompt_suffix
        self.rows = miniature_rows(name) if name.startswith("miniature") else load_rows(name, split, option)
        if not len(self.rows):
            raise UserError(f"{option} {name} holds no rows")
        if isinstance(self.rows, list):
            for i in range(len(self.rows)):  # name a bad row now, not in the middle of the night
                self[i]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i: int) -> Problem:
        if self.name.startswith("miniature"):
            question, answer = self.rows[i]
            return Problem(question, "math", answer)
        return problem_from_row(self.rows[i], f"{self.name}, row {i + 1}", self.suffix)


def encode_prompt(problem: Problem, tokenizer, cfg: Config) -> list[int]:
    """Token ids of a problem in the format of --template; the chat template is applied exactly once."""
    prompt = problem.prompt
    if cfg.template != "chat":
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        text = ZERO_TEMPLATE.format(question=text) if cfg.template == "zero" else text
        return tokenizer(text, add_special_tokens=cfg.template == "zero")["input_ids"]
    if not tokenizer.chat_template:
        raise UserError("--template chat: the model's tokenizer has no chat template; give --template zero or none")
    if isinstance(prompt, str):
        system = [{"role": "system", "content": cfg.system_prompt}] if cfg.system_prompt else []
        prompt = system + [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


class PromptQueue:
    """Prompts in shuffled epochs, drawn in one global order; prompts put back come first. Its state is JSON."""

    def __init__(self, problems: Problems, tokenizer, cfg: Config):
        self.problems, self.tokenizer, self.cfg = problems, tokenizer, cfg
        self.state = {"epoch": 0, "position": 0, "head": [], "pass_rate": 1.0, "too_long": 0}
        self.order = self._shuffled()

    def _shuffled(self):
        order = list(range(len(self.problems)))
        random.Random(f"{self.cfg.seed} epoch {self.state['epoch']}").shuffle(order)
        return order

    def load(self, state: dict):
        self.state = state
        self.order = self._shuffled()

    def draw(self, n: int) -> list[tuple[int, list[int]]]:
        """The next n prompts that are short enough, as (index, token ids)."""
        s, drawn, skipped = self.state, [], 0
        while len(drawn) < n:
            if s["head"]:
                index = s["head"].pop(0)
            else:
                if s["position"] == len(self.order):
                    s["epoch"], s["position"] = s["epoch"] + 1, 0
                    self.order = self._shuffled()
                index = self.order[s["position"]]
                s["position"] += 1
            ids = encode_prompt(self.problems[index], self.tokenizer, self.cfg)
            if len(ids) <= self.cfg.max_prompt_tokens:
                drawn.append((index, ids))
                skipped = 0
                continue
            s["too_long"] += 1
            skipped += 1
            if skipped >= len(self.problems):
                raise UserError(f"--max-prompt-tokens {self.cfg.max_prompt_tokens}: all {skipped} prompts are longer")
        return drawn

    def put_back(self, indices: list[int]):
        """Return prompts whose rollouts were not used to the head of the queue, in order."""
        self.state["head"] = indices + self.state["head"]


# The miniature: chains of six operations mod 10, worked from left to right. `9-5*8+7+0+1-7=` is answered by
# `9-5=4,4*8=2,2+7=9,9+0=9,9+1=0,0-7=3,\boxed{3}`.

MINIATURE_OPS = 6


def miniature_steps(question: str, fact=None) -> list[str]:
    """Each step `a+b=c` of a chain; fact(a, op, b, right) may write another result than the right one."""
    value, steps = int(question[0]), []
    for op, b in re.findall(r"([-+*])(\d)", question):
        right = {"+": value + int(b), "-": value - int(b), "*": value * int(b)}[op] % 10
        result = right if fact is None else fact(value, op, int(b), right)
        steps.append(f"{value}{op}{b}={result}")
        value = result
    return steps


def miniature_rows(name: str) -> list[tuple[str, str]]:
    """(question, answer) pairs of the sets miniature (RL prompts), miniature-val and -test; disjoint, fixed."""
    sizes = {"miniature-test": 512, "miniature-val": 512, "miniature": 20000}
    if name not in sizes:
        raise UserError(f"no built-in set {name}: there are {', '.join(sizes)}")
    rng, seen = random.Random("miniature"), {}
    for question in (_miniature_question(rng) for _ in iter(int, 1)):
        seen.setdefault(question, miniature_steps(question)[-1][-1])
        if len(seen) == sum(sizes.values()):
            break
    start = sum(list(sizes.values())[:list(sizes).index(name)])
    return list(seen.items())[start:start + sizes[name]]


def _miniature_question(rng: random.Random) -> str:
    return str(rng.randrange(10)) + "".join(rng.choice("+-*") + str(rng.randrange(10)) for _ in range(MINIATURE_OPS)) + "="


def miniature_sft_rows(seed: int, n: int = 33600) -> list[dict]:
    """Worked solutions of a fallible teacher: a fixed fifth of the 300 facts is wrong 60% of the time, all else 5%."""
    rng = random.Random(f"teacher {seed}")
    held_out = {q for s in ("miniature-val", "miniature-test") for q, _ in miniature_rows(s)}
    facts = [(a, op, b) for a in range(10) for op in "+-*" for b in range(10)]
    misbelief = {f: rng.randrange(1, 10) for f in rng.sample(facts, len(facts) // 5)}

    def fact(a, op, b, right):
        wrong = misbelief.get((a, op, b))
        if wrong is not None and rng.random() < 0.6:
            return (right + wrong) % 10
        return rng.randrange(10) if rng.random() < 0.05 else right

    rows = []
    while len(rows) < n:
        question = _miniature_question(rng)
        if question not in held_out:
            steps = miniature_steps(question, fact)
            rows.append({"prompt": question, "response": ",".join(steps) + f",\\boxed{{{steps[-1][-1]}}}"})
    return rows


def make_miniature_model(folder: Path, seed: int) -> None:
    """Write a randomly initialised Llama of 0.3M parameters and its tokenizer as an ordinary transformers folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = ["<pad>", "<eos>", "<unk>", "\\boxed{", "}", ",", "=", "+", "-", "*", *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                            unk_token="<unk>").save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(
            vocab_size=len(vocab), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )).save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Models: load, shard with FSDP2, token log-probabilities. One process is a group of one: the same path everywhere.

LOGIT_CHUNK = 1024  # response tokens whose (tokens, vocabulary) float32 logits exist at one time


def setup_distributed() -> None:
    """Join torchrun's process group, or make one of this process alone."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3), **alone)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def gather(items: list) -> list[list]:
    """Every rank's list, on every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return parts


class TokenModel(nn.Module):
    """A causal LM whose forward yields one number a response token: its log-probability, or a critic's V(y_<t)."""

    def __init__(self, lm, value_head: bool = False):
        super().__init__()
        self.lm = lm
        self.value_head = nn.Linear(lm.config.hidden_size, 1, bias=False) if value_head else None

    def forward(self, ids: Tensor, predicts: Tensor, temperature: float = 1.0) -> Tensor:
        """ids (b, L), padded on the right; predicts (b, L-1), true where the next token is wanted -> (n,) float32.

        Causal attention never looks at the padding to the right, so no attention mask is needed or built.
        """
        hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][predicts]
        if self.value_head is not None:
            return self.value_head(hidden).squeeze(-1).float()
        weight, targets = self.lm.get_output_embeddings().weight, ids[:, 1:][predicts]
        pieces = zip(hidden.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK))
        return torch.cat([checkpoint(_chunk_logps, h, weight, t, temperature, use_reentrant=False) for h, t in pieces])


def _chunk_logps(hidden, weight, targets, temperature):
    logits = F.linear(hidden, weight).float() / temperature
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def from_pretrained(loader, name: str, option: str, **kwargs):
    """loader.from_pretrained(name), its many errors as one line."""
    try:
        return loader.from_pretrained(name, **kwargs)
    except Exception as e:  # the hub client and transformers raise dozens of kinds
        raise UserError(f"{option} {name}: cannot be loaded ({str(e).strip().splitlines()[0][:200]})") from None


def load_model(name: str, cfg: Config, option: str = "--model", frozen: bool = False, value_head: bool = False) -> TokenModel:
    """Shard a model over the ranks. Rank 0 reads it and deals its parameters out one by one; the others never hold it.

    Trained models keep float32 weights and compute in --dtype; a frozen one is stored in --dtype, the same numbers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    compute = getattr(torch, cfg.dtype)
    stored = compute if frozen else torch.float32
    config = from_pretrained(AutoConfig, name, option)
    if any(getattr(config, key, None) not in (None, 0, 1) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
        raise UserError(f"{option} {name}: models that scale their logits are not supported")
    for key in [k for k in config.to_dict() if k.endswith(("dropout", "pdrop"))]:
        setattr(config, key, 0.0)
    config.use_cache = False
    source = None
    if dist.get_rank() == 0:
        source = from_pretrained(AutoModelForCausalLM, name, option, config=config, dtype=torch.float32)
    with torch.device("meta"):
        model = TokenModel(AutoModelForCausalLM.from_config(config, dtype=stored), value_head).train()
    if cfg.activation_checkpointing and not frozen:
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    plan = dict(mesh=dist.device_mesh.init_device_mesh(device().type, (dist.get_world_size(),)),
                mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
                offload_policy=CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy())
    for block in model.lm.base_model.layers:
        fully_shard(block, **plan)
    fully_shard(model, **plan)
    model.to_empty(device="cpu" if cfg.cpu_offload else device())
    values = dict(TokenModel(source).named_parameters()) | dict(TokenModel(source).named_buffers()) if source else {}
    with torch.no_grad():
        for key, p in model.named_parameters():
            full = torch.zeros(p.shape, dtype=stored, device=device())
            if key in values:  # on rank 0; a critic's head stays zero
                full.copy_(values[key])
            p.to_local().copy_(distribute_tensor(full, p.device_mesh, p.placements).to_local())
        for key, b in list(model.named_buffers()):  # rotary frequencies: not in a state dict, garbage after to_empty
            full = values[key].to(device()) if key in values else torch.empty_like(b, device=device())
            dist.broadcast(full, 0)
            owner, _, leaf = key.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = full
    model.lm.generation_config = source.generation_config if source else None
    return model.requires_grad_(not frozen)


def full_weights(model: TokenModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Stream a sharded model's (name, whole tensor) pairs, one at a time; every rank must run through all of them."""
    for name, p in model.lm.named_parameters():
        p = p.detach().to(device=device(), dtype=dtype)
        yield name, p.full_tensor() if isinstance(p, DTensor) else p


def save_pretrained(model: TokenModel, tokenizer, folder: Path, **notes) -> None:
    """Write an ordinary transformers folder, complete or not at all; notes become its implicit_prm.json."""
    weights = {}
    for name, tensor in full_weights(model, torch.float32):
        if dist.get_rank() == 0:
            weights[name] = tensor.cpu()
    if dist.get_rank() == 0:
        tmp = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        with torch.device("meta"):
            shell = type(model.lm)(model.lm.config)
        shell.generation_config = model.lm.generation_config
        shell.save_pretrained(tmp, state_dict=weights)
        tokenizer.save_pretrained(tmp)
        if notes:
            (tmp / "implicit_prm.json").write_text(json.dumps(notes))
        shutil.rmtree(folder, ignore_errors=True)
        tmp.rename(folder)
    dist.barrier()


class Learner:
    """A trained model with its optimizer."""

    def __init__(self, model: TokenModel, lr: float, weight_decay: float, grad_clip: float):
        self.model, self.grad_clip = model, grad_clip
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    def update(self) -> float:
        """Clip, step, clear; returns the gradient norm before the clip."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


@dataclass
class Models:
    """What train updates, and the frozen reference; None where the options need none."""
    policy: Learner
    prm: Optional[Learner]
    ref: Optional[TokenModel]
    critic: Optional[Learner]
    parameters: int = 0  # of the policy
    peak: float = 1.0  # operations a second of a matrix product on this device

    @property
    def learners(self) -> dict[str, Learner]:
        """What a checkpoint holds."""
        return {name: x for name in ("policy", "prm", "critic") if (x := getattr(self, name))}


def load_models(name: str, cfg: Config) -> Models:
    """Policy, PRM and reference, all from the model called name (Alg. 1), and PPO's critic."""
    prm = ref = critic = None
    policy = Learner(load_model(name, cfg), cfg.lr, cfg.weight_decay, cfg.grad_clip)
    if cfg.reward != "outcome":
        prm = Learner(load_model(cfg.prm or name, cfg, "--prm"), cfg.prm_lr, cfg.prm_weight_decay, cfg.prm_grad_clip)
        ref = load_model(name, cfg, frozen=True) if cfg.prm_ref == "sft" else None
    if cfg.estimator == "ppo":
        critic = Learner(load_model(name, cfg, value_head=True), cfg.critic_lr, 0.0, cfg.grad_clip)
    parameters = sum(p.numel() for p in policy.model.parameters())
    return Models(policy, prm, ref, critic, parameters, matmul_flops(getattr(torch, cfg.dtype)))


@dataclass
class Batch:
    """B responses on every rank: whole token sequences, and (B, T) tensors over response positions."""
    tokens: list[Tensor]  # prompt and response
    prompt_lengths: list[int]
    mask: Tensor  # (B, T)
    outcomes: Tensor  # (B,)
    engine_logps: Tensor  # (B, T)

    @staticmethod
    def of(rollouts: list["Rollout"]) -> "Batch":
        def padded(rows):
            return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True).float().to(device())

        return Batch(tokens=[torch.tensor(r.prompt_ids + r.ids, device=device()) for r in rollouts],
                     prompt_lengths=[len(r.prompt_ids) for r in rollouts],
                     mask=padded([[1.0] * len(r.ids) for r in rollouts]),
                     outcomes=torch.tensor([r.outcome for r in rollouts], device=device()),
                     engine_logps=padded([r.logps for r in rollouts]))


def micro_batches(lengths: list[int], token_budget: int, world: int = 1) -> list[list[int]]:
    """Cut sequences, longest first, into micro-batches of similar length.

    Each of the world ranks takes every world-th row of a micro-batch, at most token_budget tokens with padding (or one
    row). Where world does not divide the number of sequences the last one stands in several times.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    order += order[-1:] * (-len(order) % world)
    batches = []
    while order:
        rows = world * max(1, token_budget // max(1, lengths[order[0]]))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def my_micro_batches(batch: Batch, rows: Iterable[int], cfg: Config) -> Iterator[list[int]]:
    """This rank's share of each micro-batch of the given rows; every rank gets equally many."""
    rows, rank, world = list(rows), dist.get_rank(), dist.get_world_size()
    for block in micro_batches([len(batch.tokens[i]) for i in rows], cfg.token_budget, world):
        yield [rows[i] for i in block[rank::world]]


def token_values(model: TokenModel, batch: Batch, rows: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities (or values) of the given rows' response tokens: (len(rows), T), zero outside the mask."""
    ids = nn.utils.rnn.pad_sequence([batch.tokens[i] for i in rows], batch_first=True)
    first = torch.tensor([batch.prompt_lengths[i] - 1 for i in rows], device=ids.device)[:, None]
    last = torch.tensor([len(batch.tokens[i]) - 1 for i in rows], device=ids.device)[:, None]
    position = torch.arange(ids.shape[1] - 1, device=ids.device)
    mask = batch.mask[rows].bool()
    values = model(ids, (first <= position) & (position < last), temperature)
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, values)


def assemble(pieces: list[tuple[list[int], Tensor]], batch: Batch) -> Tensor:
    """Each rank's (rows, (len(rows), T)) pieces -> the detached (B, T) tensor, on every rank."""
    whole = torch.full_like(batch.mask, -torch.inf)
    for rows, values in pieces:
        whole[rows] = values.detach()
    dist.all_reduce(whole, dist.ReduceOp.MAX)
    return whole.masked_fill(batch.mask == 0, 0.0)


@torch.no_grad()
def score(model: TokenModel, batch: Batch, cfg: Config, minibatch: int, temperature: float = 1.0,
          rows: Optional[range] = None) -> Tensor:
    """token_values of the whole batch (or of rows) without gradients: (B, T), on every rank.

    It is cut as a training pass with this minibatch would cut it, so that equal weights give equal numbers.
    """
    rows = range(len(batch.tokens)) if rows is None else rows
    return assemble([(mine, token_values(model, batch, mine, temperature)) for start in range(0, len(rows), minibatch)
                     for mine in my_micro_batches(batch, rows[start:start + minibatch], cfg)], batch)


# ----------------------------------------------------------------------------------------------------------------------
# Rollout (Sec. 3): two engines with one small interface, verification beside generation, the online prompt filter.


@dataclass
class Rollout:
    """One response: its tokens, the engine's log-probabilities of them, and its verified outcome in [0, 1]."""
    index: int  # of the problem
    prompt_ids: list[int]
    ids: list[int]
    logps: list[float]
    truncated: bool
    text: str = ""
    outcome: float = 0.0


class HFEngine:
    """Samples with transformers from an unsharded copy of the policy on each rank."""

    def __init__(self, name: str, cfg: Config, stop_ids: list[int]):
        from transformers import AutoModelForCausalLM
        self.lm = from_pretrained(AutoModelForCausalLM, name, "--model", dtype=getattr(torch, cfg.dtype)).to(device()).eval()
        self.stop_ids, self.batch = torch.tensor(stop_ids, device=device()), cfg.rollout_batch

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, Tensor]]):
        """Take the policy's weights."""
        own = dict(self.lm.named_parameters())
        for name, tensor in weights:
            own[name].copy_(tensor)

    def sleep(self):
        """Nothing to free."""

    def close(self):
        """Nothing to shut down."""

    def generate(self, prompts, k, max_tokens, temperature, seed):
        """K responses a prompt of token ids; yields (prompt number, ids, logps, truncated) as each one ends.

        temperature 0 is greedy. Of equal length, prompts run without padding; finished rows leave the batch at once.
        """
        rng = torch.Generator(device()).manual_seed(seed)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, self.batch // k)
        for start in range(0, len(order), size):
            yield from self._decode([(i, prompts[i]) for i in order[start:start + size]], k, max_tokens, temperature, rng)

    @torch.no_grad()
    def _decode(self, chunk, k, max_tokens, temperature, rng):
        width = max(len(p) for _, p in chunk)
        ids = torch.tensor([[0] * (width - len(p)) + p for _, p in chunk], device=device())
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for _, p in chunk], device=device())
        padded = not bool(mask.all())
        out = self.lm(input_ids=ids, attention_mask=mask if padded else None, use_cache=True, logits_to_keep=1,
                      position_ids=(mask.cumsum(-1) - 1).clamp(min=0) if padded else None)
        cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(k, 0)
        cache.batch_repeat_interleave(k)
        mask = mask.repeat_interleave(k, 0)
        alive = torch.arange(len(chunk) * k, device=device())  # rows of the batch that still run
        tokens = torch.zeros(len(alive), max_tokens, dtype=torch.long, device=device())
        logps = torch.zeros(len(alive), max_tokens, device=device())
        for t in range(max_tokens):
            log_probs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
            if temperature == 0:
                token = log_probs.argmax(-1)
            else:
                token = torch.multinomial(log_probs.exp(), 1, generator=rng).squeeze(-1)
            tokens[alive, t] = token
            logps[alive, t] = log_probs.gather(-1, token[:, None]).squeeze(-1)
            stopped = torch.isin(token, self.stop_ids)
            ended = stopped if t + 1 < max_tokens else torch.ones_like(stopped)
            if ended.any():
                for row, stop in zip(alive[ended].tolist(), stopped[ended].tolist()):
                    yield chunk[row // k][0], tokens[row, :t + 1].tolist(), logps[row, :t + 1].tolist(), not stop
                going = (~ended).nonzero().squeeze(-1)
                if not len(going):
                    return
                alive, token, mask = alive[going], token[going], mask[going]
                cache.batch_select_indices(going)
            mask = F.pad(mask, (0, 1), value=1)
            logits = self.lm(input_ids=token[:, None], attention_mask=mask if padded else None, past_key_values=cache,
                             position_ids=mask.sum(-1, keepdim=True) - 1, use_cache=True).logits[:, -1]


class VLLMEngine:
    """Samples with vLLM, one engine in each rank's process (data-parallel rollouts), asleep while training."""

    def __init__(self, name: str, cfg: Config, stop_ids: list[int]):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in process: weights pass by reference, no process is left
        try:
            import vllm
        except ImportError as e:
            raise UserError(f"--rollout vllm: vllm cannot be imported ({e}); pip install vllm, or --rollout hf") from None
        self.cuda, self.asleep, self.stop_ids, self.vllm = torch.cuda.is_available(), False, stop_ids, vllm
        launcher = {"distributed_executor_backend": "external_launcher"} if "RANK" in os.environ else {}
        self.llm = vllm.LLM(
            name, dtype=cfg.dtype, max_model_len=cfg.max_prompt_tokens + cfg.max_response_tokens, seed=cfg.seed,
            gpu_memory_utilization=cfg.vllm_memory, enable_sleep_mode=self.cuda, enforce_eager=not self.cuda,
            logprobs_mode="processed_logprobs", disable_log_stats=True, **launcher)
        self.requests = 0

    def sync(self, weights: Iterable[tuple[str, Tensor]]):
        """Wake, and take the policy's weights."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()
        self.asleep = False

    def sleep(self):
        """Give the GPU to training. Level 2 drops the weights too: each sync sends them anyway."""
        if self.cuda:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self):
        """Shut the engine down; this also ends torch.distributed, so it comes last."""
        self.llm.llm_engine.engine_core.shutdown()

    def generate(self, prompts, k, max_tokens, temperature, seed):
        """As HFEngine.generate."""
        torch.manual_seed(seed)  # the engine samples from this process's default generators
        params = self.vllm.SamplingParams(temperature=temperature, max_tokens=max_tokens, logprobs=0,
                                          stop_token_ids=self.stop_ids, detokenize=False)
        engine, owner = self.llm.llm_engine, {}
        for i, prompt in enumerate(prompts):
            for _ in range(k):
                self.requests += 1
                owner[str(self.requests)] = i
                engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for request in engine.step():
                if request.finished:
                    out = request.outputs[0]
                    ids = list(out.token_ids)
                    logps = [step[token].logprob for step, token in zip(out.logprobs, ids)]
                    yield owner[request.request_id], ids, logps, out.finish_reason == "length"


def make_engine(name: str, tokenizer, cfg: Config):
    """The engine --rollout asks for."""
    from transformers import GenerationConfig
    stop = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):  # a folder may lack generation_config.json
        ids = GenerationConfig.from_pretrained(name).eos_token_id
        stop |= set(ids if isinstance(ids, list) else [ids])
    kind = cfg.rollout
    if kind == "auto":
        kind = "vllm" if torch.cuda.is_available() and find_spec("vllm") else "hf"
    return (VLLMEngine if kind == "vllm" else HFEngine)(name, cfg, sorted(stop - {None}))


@dataclass
class Sampler:
    """What turns prompts into verified rollouts."""
    engine: object
    verifier: verify.Verifier
    tokenizer: object
    cfg: Config
    policy: Optional[TokenModel] = None  # None: the engine's own weights are the ones wanted

    @classmethod
    @contextlib.contextmanager
    def open(cls, name: str, tokenizer, cfg: Config, policy: Optional[TokenModel]):
        """Start the verifier and the engine; stop both at the end, the engine last."""
        engine = make_engine(name, tokenizer, cfg)
        try:
            with verify.Verifier(cfg.verify_workers, cfg.verify_timeout, sandbox=cfg.sandbox) as verifier:
                yield cls(engine, verifier, tokenizer, cfg, policy)
        finally:
            engine.close()

    @contextlib.contextmanager
    def awake(self):
        """The engine awake with the policy's weights; asleep afterwards."""
        if self.policy is not None:
            self.engine.sync(full_weights(self.policy, getattr(torch, self.cfg.dtype)))
        yield
        if self.policy is not None:
            self.engine.sleep()

    def sample(self, problems: Problems, prompts: list[tuple[int, list[int]]], k: int, temperature: float,
               seed: str, bar: Optional[tqdm] = None) -> list[list[Rollout]]:
        """K verified rollouts of each (problem index, token ids), in the order given, on every rank.

        The prompts are dealt over the ranks; a response goes to the verifier while others are still being generated.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        mine, pending = prompts[rank::world], []
        groups = [[] for _ in mine]
        number = random.Random(f"{self.cfg.seed} {seed} rank {rank}").getrandbits(31)
        for i, ids, logps, truncated in self.engine.generate(
                [ids for _, ids in mine], k, self.cfg.max_response_tokens, temperature, number):
            index, prompt_ids = mine[i]
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            groups[i].append(Rollout(index, prompt_ids, ids, logps, truncated, text))
            try:
                pending.append((groups[i][-1], self.verifier.submit(text, problems[index].task, problems[index].reference)))
            except RuntimeError as e:  # no sandbox for programs
                raise UserError(f"--sandbox: {e}") from None
            if bar is not None:
                bar.update(dist.get_world_size())
        for rollout, future in pending:
            rollout.outcome = future.result()
        parts = gather(groups)
        return [parts[i % world][i // world] for i in range(len(prompts))]


def accuracy_filter(outcomes: Tensor, group_size: int, low: float, high: float) -> Tensor:
    """Online prompt filter (Sec. 3): outcomes (P*K,) -> (P,) bool, mean accuracy in [low, high] to 1e-6."""
    accuracy = outcomes.view(-1, group_size).double().mean(-1)
    return (accuracy >= low - 1e-6) & (accuracy <= high + 1e-6)


def collect_rollouts(sampler: Sampler, queue: PromptQueue, cfg: Config, step: int):
    """Algorithm 1's sampling: draw, verify and filter groups until the batch is full.

    Groups are accepted in the order drawn. Surplus groups' prompts return to the queue, their rollouts are dropped.
    Returns (rollouts kept, all rollouts considered, metrics).
    """
    kept, considered, drawn = [], [], 0
    with sampler.awake():
        while len(kept) < cfg.prompts_per_step:
            missing = cfg.prompts_per_step - len(kept)
            prompts = queue.draw(math.ceil(missing / queue.state["pass_rate"]))
            drawn += len(prompts)
            groups = sampler.sample(queue.problems, prompts, cfg.group_size, cfg.temperature, f"step {step} draw {drawn}")
            for n, group in enumerate(groups):
                if len(kept) == cfg.prompts_per_step:
                    queue.put_back([index for index, _ in prompts[n:]])
                    break
                considered.append(group)
                passes = not cfg.filter or bool(accuracy_filter(
                    torch.tensor([r.outcome for r in group]), cfg.group_size, cfg.filter_low, cfg.filter_high))
                if passes and not (cfg.drop_truncated and any(r.truncated for r in group)):
                    kept.append(group)
            queue.state["pass_rate"] = max(0.1, len(kept) / len(considered))
            if drawn >= cfg.max_draws * cfg.prompts_per_step and len(kept) < cfg.prompts_per_step:
                mean = sum(r.outcome for g in considered for r in g) / (len(considered) * cfg.group_size)
                raise UserError(f"--data cannot fill the batch: {len(kept)} of {cfg.prompts_per_step} prompts passed the filter "
                                f"after {drawn} draws, mean accuracy {mean:.2f}; choose fitting problems, widen --filter-low/"
                                "--filter-high, or raise --max-draws")
    responses = [r for g in considered for r in g]
    lengths = [len(r.ids) for r in responses]
    return [r for g in kept for r in g], responses, {
        "rollout/accuracy": sum(r.outcome for r in responses) / len(responses),
        "rollout/kept_prompts": len(kept),
        "rollout/considered_prompts": len(considered),
        "rollout/drawn_prompts": drawn,
        "rollout/equal_groups": sum(len({r.outcome for r in g}) == 1 for g in kept),
        "rollout/truncated": sum(r.truncated for r in responses) / len(responses),
        "rollout/length": sum(lengths) / len(lengths),
        "rollout/tokens": sum(lengths),
        "rollout/too_long_prompts": queue.state["too_long"],
        "rollout/epoch": queue.state["epoch"]}


# ----------------------------------------------------------------------------------------------------------------------
# Implicit process reward (Eq. 3) and the PRM's loss. From here on the mathematics: tensors in, tensors out.

NORM_FLOOR = 1e-3  # a batch whose largest |reward-to-go| is below this holds rounding noise, not rewards


def implicit_rewards(prm_logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_phi(y_t) = beta * log(pi_phi(y_t | y_<t) / pi_ref(y_t | y_<t)), Eq. 3. All (B, T); zero outside the mask."""
    return beta * (prm_logps - ref_logps) * mask


def prm_loss(process_rewards: Tensor, outcomes: Tensor, mask: Tensor, denominator: Optional[float] = None) -> Tensor:
    """Cross-entropy of sigma(R_phi(y)), R_phi = sum of the process rewards, on outcomes (B,) in [0, 1] -> ().

    denominator: responses of the global minibatch (default: of this call), so that micro-batches add up to its mean.
    """
    logits = (process_rewards * mask).sum(-1)
    return F.binary_cross_entropy_with_logits(logits, outcomes, reduction="sum") / (denominator or len(outcomes))


def dpo_loss(sequence_rewards: Tensor, outcomes: Tensor, group_size: int) -> Tensor:
    """-log sigma(R_i - R_j), mean over the pairs of a group with r_o(i) > r_o(j) (Table 8). (B,), (B,) -> ()."""
    rewards, outcomes = sequence_rewards.view(-1, group_size), outcomes.view(-1, group_size)
    better = outcomes[:, :, None] > outcomes[:, None, :]
    margins = (rewards[:, :, None] - rewards[:, None, :])[better]
    return -F.logsigmoid(margins).sum() / max(1, margins.numel())


def normalize_rewards(process_rewards: Tensor, mask: Tensor) -> Tensor:
    """Divide (B, T) process rewards by the batch's largest |reward-to-go| (official code); below NORM_FLOOR leave them."""
    largest = discounted_returns(process_rewards * mask, 1.0).abs().max()
    return process_rewards / largest if largest >= NORM_FLOOR else process_rewards


def prm_metrics(sequence_rewards: Tensor, outcomes: Tensor, group_size: int) -> dict[str, float]:
    """How well R_phi (B,) tells right (outcome > 1/2) from wrong; chance is 0.5 for auc and pair_accuracy, which counts
    the pairs of a group whose outcomes differ; accuracy is to be read beside the majority share."""
    def share_ordered(high, low, pairs):
        difference = (high - low)[pairs]
        return float(((difference > 0) + 0.5 * (difference == 0)).mean()) if difference.numel() else 0.5

    right = outcomes > 0.5
    r, o = sequence_rewards.view(-1, group_size), outcomes.view(-1, group_size)
    share = float(right.float().mean())
    return {"auc": share_ordered(sequence_rewards[:, None], sequence_rewards[None, :], right[:, None] & ~right[None, :]),
            "pair_accuracy": share_ordered(r[:, :, None], r[:, None, :], o[:, :, None] > o[:, None, :]),
            "accuracy": float(((sequence_rewards > 0) == right).float().mean()), "majority": max(share, 1 - share)}


def score_and_update_prm(prm: Optional[Learner], ref_logps: Optional[Tensor], batch: Batch,
                         cfg: Config) -> tuple[Optional[Tensor], dict]:
    """The batch's process rewards (B, T), detached, the PRM's update on its outcomes, and metrics; None without a PRM.

    --prm-update says which PRM scores a response: single, the forward of its own training minibatch (as published);
    score-first, the PRM before any update; double, the PRM after all; none, a PRM that is never updated.
    """
    if prm is None:
        return None, {}
    size, everything, world = cfg.prm_minibatch, range(len(batch.tokens)), dist.get_world_size()

    def rewards_of(logps, rows=slice(None)):
        return implicit_rewards(logps, ref_logps[rows], batch.mask[rows], cfg.beta)

    scores = score(prm.model, batch, cfg, size) if cfg.prm_update in ("score-first", "none") else None
    passes, losses, norms = [], [], []
    for rows in [everything[i:i + size] for i in everything[::size]] if cfg.prm_update != "none" else []:
        pull = None
        if cfg.prm_loss == "dpo":  # dL/dR_phi(y) from a pass without gradients, so that micro-batches may split groups
            before = scores if cfg.prm_update == "score-first" and not norms else score(prm.model, batch, cfg, size, rows=rows)
            sums = rewards_of(before)[rows].sum(-1).requires_grad_()
            loss = dpo_loss(sums, batch.outcomes[rows], cfg.group_size)
            pull, = torch.autograd.grad(loss, sums)
            losses.append(loss.detach())
        total = torch.zeros((), device=batch.mask.device)
        for mine in my_micro_batches(batch, rows, cfg):
            logps = token_values(prm.model, batch, mine)
            rewards = rewards_of(logps, mine)
            if pull is None:
                loss = prm_loss(rewards, batch.outcomes[mine], batch.mask[mine], len(rows))
            else:
                loss = (rewards.sum(-1) * pull[[i - rows[0] for i in mine]]).sum()
            (loss * world).backward()  # FSDP averages gradients over the ranks
            total += loss.detach()
            passes.append((mine, logps))
        if pull is None:
            dist.all_reduce(total)
            losses.append(total)
        norms.append(prm.update())
    if cfg.prm_update == "single":
        scores = assemble(passes, batch)
    elif cfg.prm_update == "double":
        scores = score(prm.model, batch, cfg, size)
    rewards = rewards_of(scores)
    metrics = {"prm/" + k: v for k, v in prm_metrics(rewards.sum(-1), batch.outcomes, cfg.group_size).items()}
    metrics |= {"reward/process": float(rewards.sum(-1).mean()), "reward/process_largest": float(rewards.abs().max())}
    if norms:
        metrics |= {"prm/loss": float(torch.stack(losses).mean()), "prm/first_loss": float(losses[0]),
                    "prm/grad_norm": sum(norms) / len(norms)}
    return rewards, metrics


# ----------------------------------------------------------------------------------------------------------------------
# Advantages (Sec. 3.2): each estimator is a sum of a process part and an outcome part, both (B, T).


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """sum over s >= t of gamma^(s-t) * rewards_s, along the last dimension, in log2(T) doubling steps."""
    returns, reach = rewards, 1
    while reach < rewards.shape[-1]:
        returns = returns + gamma ** reach * F.pad(returns[..., reach:], (0, reach))
        reach *= 2
    return returns


def token_means(process_rewards: Tensor, mask: Tensor) -> Tensor:
    """Mean process reward a token of each response: (B, T) -> (B,)."""
    return (process_rewards * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def leave_one_out(values: Tensor, group_size: int) -> Tensor:
    """Mean over the other K-1 responses of the group: (B,) -> (B,)."""
    groups = values.view(-1, group_size)
    return ((groups.sum(-1, keepdim=True) - groups) / (group_size - 1)).view(-1)


def rloo_advantages(process_rewards: Tensor, outcomes: Tensor, mask: Tensor, group_size: int, gamma: float = 1.0,
                    baseline: str = "token-mean") -> Tensor:
    """Eq. 5, not whitened: process_rewards (B, T), outcomes (B,) -> (B, T).

    A_t = sum_{s>=t} gamma^(s-t) [r_phi(y_s) - b_phi] + r_o - b_o; the baselines b are means over the other responses,
    b_phi over their token means (the paper's text; its formula prints the sums). baseline "official" is the released
    code's r * K/(K-1) - (sum of all K token means)/(K-1), which stretches what varies inside a response.
    """
    assert group_size > 1, "leave-one-out needs two responses a prompt"
    means = token_means(process_rewards, mask)
    if baseline == "official":
        everyone = means.view(-1, group_size).sum(-1).repeat_interleave(group_size)
        centered = (process_rewards * group_size - everyone[:, None]) / (group_size - 1)
    else:
        centered = process_rewards - leave_one_out(means, group_size)[:, None]
    outcome_part = outcomes - leave_one_out(outcomes, group_size)
    return (discounted_returns(centered * mask, gamma) + outcome_part[:, None]) * mask


def reinforce_advantages(process_rewards: Tensor, outcomes: Tensor, mask: Tensor, group_size: int, gamma: float = 1.0,
                         baseline: str = "none") -> Tensor:
    """Eq. 8: A_t = r_o + sum_{s>=t} gamma^(s-t) r_phi(y_s), no baseline. Shapes as rloo_advantages."""
    return (discounted_returns(process_rewards * mask, gamma) + outcomes[:, None]) * mask


def grpo_advantages(process_rewards: Tensor, outcomes: Tensor, mask: Tensor, group_size: int, gamma: float = 1.0,
                    baseline: str = "none", eps: float = 1e-6) -> Tensor:
    """Eq. 7: outcomes standardised in their group, process rewards by the group's mean and std of token means.

    Shapes as rloo_advantages; the standard deviations are unbiased (K-1), eps is added to them.
    """
    def mean_std(values):
        groups = values.view(-1, group_size)
        return groups.mean(-1).repeat_interleave(group_size), groups.std(-1).repeat_interleave(group_size) + eps

    mean, std = mean_std(token_means(process_rewards, mask))
    outcome_mean, outcome_std = mean_std(outcomes)
    process_part = discounted_returns((process_rewards - mean[:, None]) / std[:, None] * mask, gamma)
    return (process_part + ((outcomes - outcome_mean) / outcome_std)[:, None]) * mask


def gae_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: rewards, values V(y_<t), mask (B, T) -> advantages, returns (B, T)."""
    values = values * mask
    following = F.pad(values[:, 1:], (0, 1))  # zero behind the last token
    advantages = discounted_returns((rewards * mask + gamma * following - values) * mask, gamma * lam) * mask
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Zero mean, unit (unbiased) variance over all response tokens given: (B, T) -> (B, T), zero outside the mask."""
    n = mask.sum()
    mean = (values * mask).sum() / n
    variance = ((values - mean) ** 2 * mask).sum() / (n - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


ESTIMATORS = {"rloo": rloo_advantages, "reinforce": reinforce_advantages, "grpo": grpo_advantages}


def estimate_advantages(process_rewards: Optional[Tensor], batch: Batch, cfg: Config,
                        values: Optional[Tensor] = None) -> tuple[Tensor, Optional[Tensor]]:
    """The advantages (B, T) that the options ask for, and a critic's targets.

    process_rewards: None without a PRM; values: the critic's, with --estimator ppo.
    """
    mask, outcomes, targets = batch.mask, batch.outcomes, None
    rewards = torch.zeros_like(mask) if process_rewards is None else process_rewards
    at_last = F.pad(mask, (0, 1)).diff(dim=-1) == -1  # the last token of each response
    if cfg.prm_role == "value":  # v_phi(y_<t): what the PRM credits the response with before token t
        advantages = (outcomes[:, None] - (rewards.cumsum(-1) - rewards)) * mask
        return whiten(advantages, mask) if cfg.whiten else advantages, None
    if cfg.granularity == "whole":
        rewards = at_last * rewards.sum(-1, keepdim=True)
    if cfg.normalize:
        rewards = normalize_rewards(rewards, mask)
    process_weight = 0.0 if cfg.reward == "outcome" else cfg.process_weight
    outcome_weight = 0.0 if cfg.reward == "process" else cfg.outcome_weight
    if cfg.estimator == "ppo":
        outcome_part, targets = gae_advantages(at_last * outcomes[:, None], values, mask, 1.0, cfg.lam)
        process_part = discounted_returns(rewards * mask, cfg.gamma) * mask
    else:
        estimator, nothing = ESTIMATORS[cfg.estimator], (torch.zeros_like(mask), torch.zeros_like(outcomes))
        outcome_part = estimator(nothing[0], outcomes, mask, cfg.group_size)
        process_part = estimator(rewards, nothing[1], mask, cfg.group_size, cfg.gamma, cfg.process_baseline)
    if cfg.granularity == "whole" and cfg.estimator != "ppo":  # R_phi as a second outcome
        process_part = estimator(nothing[0], rewards.sum(-1), mask, cfg.group_size)
    advantages = process_weight * process_part + outcome_weight * outcome_part
    return whiten(advantages, mask) if cfg.whiten else advantages, targets


# ----------------------------------------------------------------------------------------------------------------------
# Policy loss and update (Eq. 6).


def ppo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float,
             denominator: Optional[float] = None) -> tuple[Tensor, Tensor]:
    """-sum min(rho A, clip(rho, 1-eps, 1+eps) A) / denominator, Eq. 6; all (B, T) -> (loss, clip fraction), both ().

    denominator: tokens of the global minibatch (default: of this call). mask may hold weights in place of ones.
    """
    denominator = mask.sum() if denominator is None else denominator
    ratio = torch.exp(logps - old_logps)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -(torch.min(plain, clipped) * mask).sum() / denominator, ((clipped < plain) * mask).sum() / denominator


def update_policy(policy: Learner, batch: Batch, advantages: Tensor, old_logps: Optional[Tensor], cfg: Config,
                  step: int) -> dict:
    """PPO's clipped updates over shuffled minibatches of whole responses; returns metrics.

    old_logps None: one update a batch, so the first forward's own log-probabilities are the old ones (ratio 1).
    """
    world, order = dist.get_world_size(), torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    passes, norms, metrics = [], [], Counter()
    weights, per_response = batch.mask, batch.mask.sum(-1, keepdim=True)
    if cfg.loss_average == "sequence":
        weights = batch.mask / per_response
    minibatches = [rows for _ in range(cfg.ppo_epochs)
                   for rows in torch.randperm(len(batch.tokens), generator=order).split(cfg.minibatch)]
    for rows in minibatches:
        rows = rows.tolist()
        denominator = weights[rows].sum()
        sums = torch.zeros(3, device=batch.mask.device)
        for mine in my_micro_batches(batch, rows, cfg):
            logps = token_values(policy.model, batch, mine, cfg.temperature)
            old = logps.detach() if old_logps is None else old_logps[mine]
            weight = weights[mine]
            if cfg.importance_cap:
                weight = weight * torch.exp(old - batch.engine_logps[mine]).clamp(max=cfg.importance_cap)
            loss, clip_fraction = ppo_loss(logps, old, advantages[mine], weight, cfg.clip, denominator)
            (loss * world).backward()  # FSDP averages gradients over the ranks
            drift = ((old - logps.detach()) * weights[mine]).sum() / denominator
            sums += torch.stack([loss.detach(), clip_fraction, drift])
            passes.append((mine, logps))
        norms.append(policy.update())
        dist.all_reduce(sums)
        metrics.update(dict(zip(("policy/loss", "policy/clip_fraction", "policy/kl_old"), (sums / len(minibatches)).tolist())))
    if old_logps is None:
        old_logps = assemble(passes, batch)
    gap = (old_logps - batch.engine_logps) * batch.mask  # engine and trainer compute the same policy: this is their noise
    tokens = batch.mask.sum()
    return dict(metrics) | {"policy/grad_norm": sum(norms) / len(norms), "policy/entropy": float(-old_logps.sum() / tokens),
                            "rollout/engine_gap": float(gap.abs().sum() / tokens),
                            "rollout/engine_gap_max": float(gap.abs().max())}


def update_critic(critic: Optional[Learner], batch: Batch, targets: Optional[Tensor], cfg: Config) -> dict:
    """Squared error of V(y_<t) against the returns (B, T), over the policy's minibatch size, in order."""
    if critic is None:
        return {}
    everything, losses = range(len(batch.tokens)), []
    for rows in [everything[i:i + cfg.minibatch] for i in everything[::cfg.minibatch]]:
        total, denominator = torch.zeros((), device=batch.mask.device), batch.mask[rows].sum()
        for mine in my_micro_batches(batch, rows, cfg):
            values = token_values(critic.model, batch, mine)
            loss = 0.5 * ((values - targets[mine]) ** 2 * batch.mask[mine]).sum() / denominator
            (loss * dist.get_world_size()).backward()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(float(total))
        critic.update()
    return {"critic/loss": sum(losses) / len(losses)}


# ----------------------------------------------------------------------------------------------------------------------
# Around the algorithm: SFT warm-up (App. D), evaluation, a page to look inside, the run folder and its checkpoints.


def sft_example(row: dict, tokenizer, cfg: Config, where: str) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids with the end of turn) of an Eurus-2-SFT-Data row or one with prompt and response."""
    if isinstance(row.get("conversations"), list) and len(row["conversations"]) >= 2:
        prompt, response = row["conversations"][0].get("value"), row["conversations"][1].get("value")
    else:
        prompt, response = row.get("prompt"), row.get("response")
    if not prompt or not isinstance(response, str):
        raise UserError(f"{where}: an SFT row holds prompt and response, or conversations")
    if row.get("system") and isinstance(prompt, str):
        prompt = [{"role": "system", "content": row["system"]}, {"role": "user", "content": prompt}]
    prompt_ids = encode_prompt(Problem(prompt, "math", ""), tokenizer, cfg)
    if cfg.template != "chat":
        return prompt_ids, tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    opening = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages + [{"role": "assistant", "content": response}], tokenize=False)
    return prompt_ids, tokenizer(whole[len(opening):].rstrip(), add_special_tokens=False)["input_ids"]


def sft_batches(rows, tokenizer, cfg: Config) -> Iterator[tuple[Batch, int]]:
    """Shuffled batches of exactly --sft-batch examples, and how many were dropped as too long so far."""
    dropped = 0
    for epoch in range(cfg.sft_epochs):
        examples = []
        for i in random.Random(f"{cfg.seed} sft {epoch}").sample(range(len(rows)), len(rows)):
            prompt, response = sft_example(rows[i], tokenizer, cfg, f"{cfg.sft_data}, row {i + 1}")
            if len(prompt) + len(response) > cfg.sft_max_tokens:
                dropped += 1
                continue
            examples.append(Rollout(i, prompt, response, [0.0] * len(response), False))
            if len(examples) == cfg.sft_batch:
                yield Batch.of(examples), dropped
                examples = []


def train_sft(name: str, tokenizer, cfg: Config, run: "Run") -> None:
    """Maximise the likelihood of worked responses (the loss is on responses only); leaves the folder RUN/sft."""
    rows = miniature_sft_rows(cfg.seed) if cfg.sft_data == "miniature" else load_rows(cfg.sft_data, "train", "--sft-data")
    updates = cfg.sft_epochs * (len(rows) // cfg.sft_batch)
    if not updates:
        raise UserError(f"--sft-data holds {len(rows)} rows, fewer than --sft-batch {cfg.sft_batch}")
    learner = Learner(load_model(name, cfg), cfg.sft_lr, cfg.sft_weight_decay, 1.0)
    with run.bar(updates, "SFT") as bar:
        for step, (batch, dropped) in enumerate(sft_batches(rows, tokenizer, cfg)):
            rate = min((step + 1) / (0.1 * updates), 0.5 + 0.5 * math.cos(math.pi * step / updates))
            learner.optimizer.param_groups[0]["lr"] = cfg.sft_lr * rate
            total = torch.zeros((), device=batch.mask.device)
            for mine in my_micro_batches(batch, range(cfg.sft_batch), cfg):
                loss = -token_values(learner.model, batch, mine).sum() / batch.mask.sum()
                (loss * dist.get_world_size()).backward()
                total += loss.detach()
            dist.all_reduce(total)
            norm = learner.update()
            bar.update()
            if step % 10 == 9:
                bar.set_postfix(loss=f"{float(total):.3f}")
                run.log({"sft/step": step + 1, "sft/loss": float(total), "sft/grad_norm": norm, "sft/too_long": dropped})
    save_pretrained(learner.model, tokenizer, run.folder / "sft")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right) from c right ones of n."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(group: list[Rollout]) -> float:
    """Outcome of the answer that most responses of a group give (equal answers pooled; first of equals)."""
    clusters = []
    for rollout in group:
        answer = verify.extract_answer(rollout.text)
        if answer is not None:
            home = next((c for c in clusters if c[0] == answer or verify.math_equal(answer, c[0])), None)
            if home is None:
                clusters.append([answer, rollout.outcome, 1])
            else:
                home[2] += 1
    return max(clusters, key=lambda c: c[2])[1] if clusters else 0.0


def evaluate(sampler: Sampler, sets: list[Problems], cfg: Config, run: "Run", step: int,
             models: Optional[Models] = None) -> dict[str, float]:
    """Greedy pass@1 and, with --eval-samples N, avg@N, pass@k, majority vote and best-of-N on each set.

    Each figure comes with its standard error over problems. Best-of-N by the PRM, where one is, with --inspect or
    --eval-only.
    Every response and its score are written to RUN/eval.
    """
    metrics, n = {}, cfg.eval_samples
    for problems in sets:
        encoded = [(i, encode_prompt(problems[i], sampler.tokenizer, cfg)) for i in range(len(problems))]
        prompts = [p for p in encoded if len(p[1]) <= cfg.max_prompt_tokens]
        if not prompts:
            raise UserError(f"--max-prompt-tokens {cfg.max_prompt_tokens}: all prompts of {problems.name} are longer")
        with sampler.awake(), run.bar(len(prompts) * (1 + n), f"evaluate {problems.name}") as bar:
            greedy = sampler.sample(problems, prompts, 1, 0.0, "greedy", bar)
            groups = sampler.sample(problems, prompts, n, cfg.eval_temperature, f"eval {problems.name}", bar) if n else []
        figures = {"greedy": [g[0].outcome for g in greedy]}
        if n:
            figures[f"avg@{n}"] = [sum(r.outcome for r in g) / n for g in groups]
            for k in [2 ** j for j in range(1, n.bit_length()) if 2 ** j <= n]:
                figures[f"pass@{k}"] = [pass_at_k(n, sum(r.outcome >= 1 for r in g), k) for g in groups]
            if all(problems[i].task == "math" for i, _ in prompts[:1]):
                figures[f"majority@{n}"] = [majority_vote(g) for g in groups]
        if n and models and models.prm and models.ref and (cfg.inspect or cfg.eval_only):
            batch = Batch.of([r for g in groups for r in g])
            rewards = implicit_rewards(score(models.prm.model, batch, cfg, len(batch.tokens)),
                                       score(models.ref, batch, cfg, len(batch.tokens)), batch.mask, cfg.beta)
            best = rewards.sum(-1).view(-1, n).argmax(-1).tolist()
            figures[f"best_of_{n}"] = [g[b].outcome for g, b in zip(groups, best)]
            if cfg.inspect:
                run.write(f"inspect-step-{step}-{problems.name}.html", inspect_page(problems, groups, rewards, sampler.tokenizer))
        prefix = f"eval/{problems.name}/"
        metrics |= {prefix + "problems": len(prompts), prefix + "too_long": len(encoded) - len(prompts)}
        for key, values in figures.items():
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
            metrics |= {prefix + key: mean, prefix + key + "_se": math.sqrt(variance / len(values))}
        run.write(f"eval/step-{step}-{Path(problems.name).stem}.jsonl", "".join(json.dumps({
            "index": i, "prompt": problems[i].prompt, "reference": problems[i].reference, "greedy": g[0].text,
            "greedy_score": g[0].outcome, "samples": [r.text for r in s], "scores": [r.outcome for r in s],
        }) + "\n" for (i, _), g, s in zip(prompts, greedy, groups or [[]] * len(prompts))))
    return metrics


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Implicit process rewards</title><style>
body{font:16px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:75rem;padding:0 1rem;color:#222}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
.response{border:1px solid #bbb;border-radius:.5rem;padding:.6rem;min-width:0}
.text,h2{white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace;font-size:.95rem}
.text span:hover{outline:2px solid #222}svg{width:100%%;height:3rem;display:block}.bar{height:1rem;max-width:22rem;
background:linear-gradient(90deg,rgb(214,80,40),#fff,rgb(30,110,210))}</style>
<h1>Implicit process rewards</h1><p>Each token is shaded by r<sub>&phi;</sub>(y<sub>t</sub>) = &beta; log &pi;<sub>&phi;</sub>/
&pi;<sub>ref</sub> (Eq. 3); hover for its value and the running sum, which the line below the text draws.</p>
<div class="bar"></div><p>from &minus;%(scale).4f (orange, or less) over 0 (white) to +%(scale).4f (blue, or more)</p>%(body)s</html>"""


def inspect_page(problems: Problems, groups: list[list[Rollout]], rewards: Tensor, tokenizer, limit: int = 12) -> str:
    """A self-contained HTML page: a right and a wrong response of one prompt side by side, tokens shaded by reward.

    rewards: (B, T), rows as the groups' responses in order. The scale is the 99th percentile of |reward|.
    """
    n, body = len(groups[0]), []
    mixed = [i for i, g in enumerate(groups) if len({r.outcome >= 1 for r in g}) == 2]
    chosen = (mixed + [i for i in range(len(groups)) if i not in set(mixed)])[:limit]
    rows = {i: sorted(range(n), key=lambda j: -groups[i][j].outcome)[::max(1, n - 1)] for i in chosen}
    shown = torch.cat([rewards[i * n + j, :len(groups[i][j].ids)].abs() for i in chosen for j in rows[i]]).cpu()
    scale = max(float(shown.quantile(0.99)), 1e-9)
    for i in chosen:
        prompt = problems[groups[i][0].index].prompt
        body.append(f"<h2>{html.escape(prompt if isinstance(prompt, str) else prompt[-1]['content'])}</h2><div class=pair>")
        for j in rows[i]:
            rollout, r = groups[i][j], rewards[i * n + j, :len(groups[i][j].ids)].tolist()
            sums, spans = [0.0], []
            for token, value in zip(rollout.ids, r):
                sums.append(sums[-1] + value)
                color = "30,110,210" if value > 0 else "214,80,40"
                spans.append(f'<span style="background:rgba({color},{min(1, abs(value) / scale):.2f})" title="r {value:+.4f}, '
                             f'sum {sums[-1]:+.4f}">{html.escape(tokenizer.decode([token]))}</span>')
            low, high = min(sums), max(max(sums), min(sums) + 1e-9)
            points = " ".join(f"{100 * t / len(r):.2f},{30 - 30 * (s - low) / (high - low):.2f}" for t, s in enumerate(sums))
            body.append(
                f'<div class=response><b>{"right" if rollout.outcome >= 1 else "wrong"}</b>, outcome {rollout.outcome:g}, '
                f'R = {sums[-1]:+.4f}<div class=text>{"".join(spans)}</div><svg viewBox="0 -1 100 32" preserveAspectRatio='
                f'"none"><polyline points="{points}" fill="none" stroke="#555" vector-effect="non-scaling-stroke"/></svg></div>')
        body.append("</div>")
    return PAGE % {"scale": scale, "body": "".join(body)}


class Run:
    """The run folder: config.json, metrics.jsonl, checkpoints, results. Rank 0 alone writes."""

    def __init__(self, cfg: Config):
        self.folder, self.main = Path(gather([cfg.output])[0][0]), dist.get_rank() == 0
        self.metrics_path, self.tracker, self.seconds, self.interrupted = self.folder / "metrics.jsonl", None, Counter(), False
        if self.main and not cfg.resume:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"--output {self.folder} is not empty: choose another, or --resume {self.folder}")
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write("config.json", json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
        if self.main and cfg.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(self.folder)
            self.tracker = lambda metrics, step: [writer.add_scalar(k, v, step) for k, v in metrics.items()] and writer.flush()
        elif self.main and cfg.report_to == "wandb":
            import wandb
            self.tracker = wandb.init(project="prime", name=self.folder.name, config=dataclasses.asdict(cfg), resume="allow").log
        dist.barrier()

    def write(self, name: str, text: str):
        """Write a file of the run folder, complete or not at all."""
        if self.main:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name + ".tmp").write_text(text, encoding="utf-8")
            path.with_name(path.name + ".tmp").replace(path)

    def log(self, metrics: dict):
        """Append a line to metrics.jsonl, and pass it to the tracker."""
        if self.main:
            with open(self.metrics_path, "a", encoding="utf-8") as f:
                f.write(json.dumps(metrics) + "\n")
            if self.tracker:
                self.tracker({k: v for k, v in metrics.items() if k != "step"}, metrics.get("step", metrics.get("sft/step")))

    def rewind(self, size: int):
        """Move what metrics.jsonl holds beyond the checkpoint's size to a backup; those steps are run anew."""
        if self.main and self.metrics_path.exists() and self.metrics_path.stat().st_size > size:
            data = self.metrics_path.read_bytes()
            number = len(list(self.folder.glob("metrics.jsonl.bak*"))) + 1
            self.metrics_path.with_name(f"metrics.jsonl.bak{number}").write_bytes(data[size:])
            os.truncate(self.metrics_path, size)

    def history(self) -> list[dict]:
        """All lines of metrics.jsonl."""
        return [json.loads(line) for line in open(self.metrics_path, encoding="utf-8")] if self.metrics_path.exists() else []

    def bar(self, total: int, text: str, initial: int = 0) -> tqdm:
        """A progress bar, on rank 0."""
        return tqdm(total=total, desc=text, initial=initial, disable=not self.main, dynamic_ncols=True)

    def end_step(self, step: int, metrics: dict, bar: tqdm):
        """Log a step, and print its line."""
        self.log({"step": step} | metrics)
        self.seconds.clear()
        bar.update()
        if self.main:
            show = [("accuracy", "rollout/accuracy", ".3f"), ("kept", "rollout/kept_prompts", "d"),
                    ("of", "rollout/considered_prompts", "d"), ("length", "rollout/length", ".0f"),
                    ("| prm loss", "prm/loss", ".4f"), ("auc", "prm/auc", ".3f"), ("pairs", "prm/pair_accuracy", ".3f"),
                    ("| policy loss", "policy/loss", ".4f"), ("clip", "policy/clip_fraction", ".3f"),
                    ("norm", "policy/grad_norm", ".2f"), ("| seconds", "time/step", ".2f"), ("rollout", "time/rollout", ".2f"),
                    ("ref", "time/ref", ".2f"), ("prm", "time/prm", ".2f"), ("policy", "time/policy", ".2f")]
            line = " ".join(f"{label} {metrics[key]:{form}}" for label, key, form in show if key in metrics)
            tqdm.write(f"step {step}: {line}")

    def summary(self):
        """Print the first and the last evaluation side by side, and where the results lie."""
        if not self.main:
            return
        lines = [line for line in self.history() if any(k.startswith("eval/") for k in line)]
        if lines:
            before, after = lines[0], lines[-1]
            print(f"\n{'held-out accuracy':32}{'problems':>9}{'step ' + str(before['step']):>18}{'step ' + str(after['step']):>18}")
            for key in [k for k in after if k.startswith("eval/") and k + "_se" in after]:
                cells = "".join(f"{m[key]:>10.3f} ± {m[key + '_se']:.3f}" if key in m else f"{'-':>18}" for m in (before, after))
                print(f"{key[5:]:32}{after[key.rsplit('/', 1)[0] + '/problems']:>9}{cells}")
        print(f"results: {self.folder}")

    @contextlib.contextmanager
    def timed(self, phase: str):
        """Count the seconds of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def catch_interrupt(self):
        """The first Ctrl-C lets the step finish and save; a second one quits at once."""
        def handler(*_):
            if self.interrupted:
                os._exit(130)
            self.interrupted = True
            tqdm.write("interrupted: finishing this step; again to quit at once", file=sys.stderr)

        signal.signal(signal.SIGINT, handler)

    def asked_to_stop(self) -> bool:
        """Whether any rank was interrupted."""
        return any(flag for part in gather([self.interrupted]) for flag in part)


def checkpoint_state(models: Models) -> dict:
    """The sharded weights and optimizer states of all learners."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    return {name: dict(zip(("model", "optimizer"), get_state_dict(x.model, x.optimizer))) for name, x in models.learners.items()}


def save_checkpoint(run: Run, step: int, models: Models, queue: PromptQueue) -> None:
    """Write RUN/checkpoints/step-N: all of it under another name, synced, renamed; only then the older one goes.

    All randomness is drawn from seeds named by step and purpose, so the step number is its whole state.
    """
    import torch.distributed.checkpoint as dcp
    folder = run.folder / "checkpoints"
    tmp, final = folder / f"step-{step}.tmp", folder / f"step-{step}"
    if run.main:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    dist.barrier()
    dcp.save(checkpoint_state(models), checkpoint_id=tmp)
    if run.main:
        size = run.metrics_path.stat().st_size
        (tmp / "state.json").write_text(json.dumps({"step": step, "metrics_bytes": size, "queue": queue.state}))
        for path in [run.metrics_path, *tmp.iterdir(), tmp]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        if final.exists():
            shutil.rmtree(final)
        tmp.rename(final)
        for old in folder.iterdir():
            if old != final:
                shutil.rmtree(old)
    dist.barrier()


def resume(run: Run, models: Models, queue: PromptQueue) -> int:
    """Load the newest complete checkpoint, on any number of processes, and rewind the metrics; returns its step, or 0."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict
    complete = [p for p in run.folder.glob("checkpoints/step-*") if p.name[5:].isdigit()]
    if not complete:
        return 0
    path = max(complete, key=lambda p: int(p.name[5:]))
    state, tensors = json.loads((path / "state.json").read_text()), checkpoint_state(models)
    dcp.load(tensors, checkpoint_id=path)
    for name, x in models.learners.items():
        set_state_dict(x.model, x.optimizer, model_state_dict=tensors[name]["model"],
                       optim_state_dict=tensors[name]["optimizer"])
    run.rewind(state["metrics_bytes"])
    queue.load(state["queue"])
    return state["step"]


def matmul_flops(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on this device: what the utilisation metrics are measured against."""
    n = 8192 if torch.cuda.is_available() else 768
    a, best = torch.randn(n, n, device=device(), dtype=dtype), math.inf
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def throughput(seconds: dict[str, float], batch: Batch, models: Models, cfg: Config) -> dict:
    """Seconds, tokens a second and model-FLOPs utilisation by phase; a forward pass is 2 operations a parameter and token,
    a backward pass 4, attention not counted."""
    tokens, metrics = sum(map(len, batch.tokens)), {f"time/{phase}": s for phase, s in seconds.items()}
    metrics["time/step"] = sum(seconds.values())
    metrics["tokens_per_second/step"] = float(batch.mask.sum()) / metrics["time/step"]
    for phase in ("prm", "policy"):
        if seconds.get(phase, 0) > 1e-4:
            metrics[f"tokens_per_second/{phase}"] = tokens / seconds[phase]
            metrics[f"mfu/{phase}"] = 6 * models.parameters * tokens / seconds[phase] / (models.peak * dist.get_world_size())
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 1.


def prepare(cfg: Config, run: Run) -> tuple[str, object]:
    """The model that policy, PRM and reference start from (a name or folder) and its tokenizer; SFT where asked for."""
    from transformers import AutoTokenizer
    name = cfg.model or str(run.folder / "init")
    if not cfg.model and run.main and not Path(name).exists():
        make_miniature_model(Path(name), cfg.seed)
    dist.barrier()
    tokenizer = from_pretrained(AutoTokenizer, name, "--model")
    if cfg.prm and from_pretrained(AutoTokenizer, cfg.prm, "--prm").get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--prm {cfg.prm} has another vocabulary than --model: the PRM reads the policy's tokens")
    if cfg.sft_data:
        if not (run.folder / "sft").exists():
            run.rewind(0)
            train_sft(name, tokenizer, cfg, run)
        name = str(run.folder / "sft")
    return name, tokenizer


def reference_logps(models: Models, batch: Batch, cfg: Config) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """(old_logps, ref_logps), each (B, T), or None where nothing needs it before the policy's first forward pass."""
    if models.prm and not models.ref:  # --prm-ref policy: one forward pass serves both
        both = score(models.policy.model, batch, cfg, cfg.prm_minibatch)
        return both, both
    several_updates = cfg.ppo_epochs * len(batch.tokens) > cfg.minibatch
    old_logps = score(models.policy.model, batch, cfg, cfg.minibatch, cfg.temperature) if several_updates else None
    return old_logps, score(models.ref, batch, cfg, cfg.prm_minibatch) if models.prm else None


def probe_prm(models: Models, considered: list[Rollout], cfg: Config, step: int) -> dict:
    """PRM quality on all rollouts, before the filter and before the update (--prm-probe-every)."""
    if not models.prm or not cfg.prm_probe_every or step % cfg.prm_probe_every:
        return {}
    batch = Batch.of(considered)
    rewards = implicit_rewards(score(models.prm.model, batch, cfg, len(considered)),
                               score(models.ref or models.policy.model, batch, cfg, len(considered)), batch.mask, cfg.beta)
    figures = prm_metrics(rewards.sum(-1), batch.outcomes, cfg.group_size)
    return {"prm/all_" + key: value for key, value in figures.items()}


def train(cfg: Config, run: Run) -> int:
    """Algorithm 1 from an SFT model, which --sft-data makes first. Returns the exit code."""
    name, tokenizer = prepare(cfg, run)
    if not cfg.steps:
        return 0
    queue = PromptQueue(Problems(cfg.data, cfg), tokenizer, cfg)
    eval_sets = [Problems(n, cfg, "test", "--eval-data") for n in cfg.eval_data or []]
    models = load_models(name, cfg)
    first = resume(run, models, queue)
    with Sampler.open(name, tokenizer, cfg, models.policy.model) as sampler, run.bar(cfg.steps, "PRIME", first) as bar:
        if first == 0:
            run.log({"step": 0} | evaluate(sampler, eval_sets, cfg, run, 0, models))
            if cfg.sft_data:
                save_checkpoint(run, 0, models, queue)
        for step in range(first + 1, cfg.steps + 1):
            with run.timed("rollout"):  # sample K responses, verify, filter by accuracy
                kept, considered, metrics = collect_rollouts(sampler, queue, cfg, step)
                batch = Batch.of(kept)
            with run.timed("ref"):
                metrics |= probe_prm(models, considered, cfg, step)
                old_logps, ref_logps = reference_logps(models, batch, cfg)
            with run.timed("prm"):  # implicit process rewards (Eq. 3), PRM update on the outcomes
                process_rewards, figures = score_and_update_prm(models.prm, ref_logps, batch, cfg)
                metrics |= figures
            with run.timed("critic"):  # --estimator ppo only
                values = score(models.critic.model, batch, cfg, cfg.minibatch) if models.critic else None
                advantages, returns = estimate_advantages(process_rewards, batch, cfg, values)  # Eq. 5
                metrics |= update_critic(models.critic, batch, returns, cfg)
            with run.timed("policy"):  # PPO's clipped update (Eq. 6)
                if step > cfg.prm_warmup_steps:
                    metrics |= update_policy(models.policy, batch, advantages, old_logps, cfg, step)
            metrics |= throughput(run.seconds, batch, models, cfg)
            stop = run.asked_to_stop()
            if step == cfg.steps or (cfg.eval_every and step % cfg.eval_every == 0 and not stop):
                metrics |= evaluate(sampler, eval_sets, cfg, run, step, models)
            run.end_step(step, metrics, bar)
            if stop or step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0):
                save_checkpoint(run, step, models, queue)
            if stop and step < cfg.steps:
                return 130
        save_pretrained(models.policy.model, tokenizer, run.folder / "policy")
        if models.prm:
            save_pretrained(models.prm.model, tokenizer, run.folder / "prm", reference=name, beta=cfg.beta)
        run.summary()
    return 0


def evaluate_only(cfg: Config, run: Run) -> int:
    """--eval-only: --model on --eval-data, with best-of-N by --prm. Returns the exit code."""
    from transformers import AutoTokenizer
    tokenizer = from_pretrained(AutoTokenizer, cfg.model, "--model")
    sets = [Problems(n, cfg, "test", "--eval-data") for n in cfg.eval_data]
    models = None
    if cfg.prm:
        notes = Path(cfg.prm) / "implicit_prm.json"
        if cfg.prm_ref == "sft" and not notes.exists():
            raise UserError("--prm-ref is missing: name the folder of the model the PRM was trained against")
        reference = json.loads(notes.read_text())["reference"] if cfg.prm_ref == "sft" else cfg.prm_ref
        prm = Learner(load_model(cfg.prm, cfg, "--prm", frozen=True), 0.0, 0.0, 0.0)
        models = Models(prm, prm, load_model(reference, cfg, "--prm-ref", frozen=True), None)
    with Sampler.open(cfg.model, tokenizer, cfg, None) as sampler:
        run.log({"step": 0} | evaluate(sampler, sets, cfg, run, 0, models))
        run.summary()
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# The command line.

UNSET = object()


def parse_args(argv: list[str]) -> Config:
    """Options given by hand win over the miniature's overrides, these over the paper's defaults; or --resume's config."""
    from transformers import HfArgumentParser
    parser = HfArgumentParser(SECTIONS, description=__doc__.split("\n\n")[0], allow_abbrev=False)

    def error(message):
        raise UserError(message)

    parser.error = error
    names = [f.name for f in dataclasses.fields(Config)]
    namespace = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, UNSET)))
    given = {name: value for name, value in vars(namespace).items() if value is not UNSET}
    if "resume" in given:
        return resumed_config(given)
    overrides, data = {}, given.get("data")
    if data == "miniature" or data is None and not {"sft_data", "eval_data", "eval_only"} & set(given):
        overrides = MINIATURE | ({} if given.get("model") else MINIATURE_SFT)
    cfg = Config(**overrides | given)
    cfg.output = cfg.output or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return cfg


def resumed_config(given: dict) -> Config:
    """The config of the run to go on with; only the number of steps may differ."""
    path = Path(given["resume"]) / "config.json"
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"--resume {given['resume']}: no readable config.json, so no run to go on with") from None
    for name, value in given.items():
        if name not in ("resume", "steps") and value != saved[name]:
            raise UserError(f"--{name.replace('_', '-')} {value} conflicts with the run's {saved[name]}: --resume keeps a "
                            "run's options, --steps apart")
    return Config(**saved | given | {"output": given["resume"]})


def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        cfg = parse_args(sys.argv[1:] if argv is None else argv)
        check_config(cfg, int(os.environ.get("WORLD_SIZE", 1)))
        setup_distributed()
        run = Run(cfg)
        return evaluate_only(cfg, run) if cfg.eval_only else train(cfg, run)
    except UserError as e:
        if int(os.environ.get("RANK", 0)) == 0 or not dist.is_initialized() or dist.get_world_size() == 1:
            print(f"prime.py: error: {e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:
        print(f"prime.py: error: out of GPU memory; what helps: a smaller --token-budget, --activation-checkpointing, "
              f"--prm-ref policy, --cpu-offload, a smaller --vllm-memory, more GPUs ({str(e).split('. ')[0]})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
