"""PRIME: Process Reinforcement through Implicit Rewards (arXiv 2502.01456), in one file.

    python prime.py                                   # the paper in miniature: minutes on a laptop, no GPU, no network
    torchrun --nproc-per-node 8 prime.py --model PRIME-RL/Eurus-2-7B-SFT --data PRIME-RL/Eurus-2-RL-Data
    python prime.py --resume runs/NAME                # go on after a kill

Algorithm 1, as `train` runs it. Policy pi_theta, implicit PRM pi_phi and reference pi_ref start from one SFT model.

    for each step
        sample K responses a prompt, verify their outcomes r_o                      collect_rollouts
        keep prompts of middling accuracy, draw until the batch is full             accuracy_filter
        r_phi(y_t) = beta * log(pi_phi(y_t) / pi_ref(y_t))                    Eq. 3 implicit_rewards
        update pi_phi by cross-entropy on the outcomes alone                        prm_loss, score_and_update_prm
        A_t = leave-one-out returns of r_phi + leave-one-out r_o              Eq. 5 rloo_advantages
        update pi_theta by PPO's clipped loss                                 Eq. 6 ppo_loss, update_policy

The file reads as the paper does: options, problems, models, rollout, implicit process reward, advantages, policy
update, what surrounds them (SFT, evaluation, checkpoints), `train` and the command line. The mathematics are pure
functions of tensors; devices, ranks and engines appear in the sections on models and rollout only.

Shapes: B = P * K responses, the K responses of a prompt next to each other; T response positions; mask (B, T) is 1 on
response tokens, the end-of-sequence token included.
"""

import argparse
import contextlib
import dataclasses
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
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import verify

# ----------------------------------------------------------------------------------------------------------------------
# Options: one dataclass a section of --help. The defaults are the paper's main experiment (Sec. 4, App. D); "official"
# marks what the paper leaves open and the released code and its run script fix.

def opt(default, text):
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text})

@dataclass
class ModelOptions:
    _argument_group_name = "models"
    model: Optional[str] = opt(None, "SFT model that all three start from: hub id or folder (paper: Eurus-2-7B-SFT)")
    prm: Optional[str] = opt(None, "other initialisation of the PRM (Sec. 5: the SFT model is best)")
    prm_ref: str = opt("sft", "reference of Eq. 3: 'sft', frozen; 'policy', its old log-probabilities, which saves a model "
                              "(Sec. 5); with --eval-only a folder")
    dtype: Literal["bfloat16", "float32"] = opt("bfloat16", "of the computation; weights and Adam stay float32 (official)")
    token_budget: int = opt(16384, "tokens of one micro-batch on one rank; a longer response goes alone")
    activation_checkpointing: bool = opt(False, "recompute activations: less memory, about a third slower")
    cpu_offload: bool = opt(False, "keep parameters, gradients and Adam states in host memory (official: on)")

@dataclass
class DataOptions:
    _argument_group_name = "data"
    data: Optional[str] = opt(None, "RL prompts: hub id, .parquet, .jsonl or 'miniature' (paper: Eurus-2-RL-Data)")
    eval_data: Optional[list[str]] = field(default=None, metadata={"help": "held-out sets, named like --data"})
    template: Literal["chat", "zero", "none"] = opt("chat", "the model's chat template; 'zero', a plain one for base models "
                                                            "(Sec. 5); 'none', the text itself")
    system_prompt: Optional[str] = opt(None, "system message for plain rows (chat rows hold their own)")
    prompt_suffix: Optional[str] = opt(None, "added to plain rows (default: ask for \\boxed{} or a python block)")
    max_prompt_tokens: int = opt(1024, "longer prompts are dropped and counted (official)")
    max_response_tokens: int = opt(3072, "responses are cut here (official)")

@dataclass
class RolloutOptions:
    _argument_group_name = "rollout (Sec. 3, 4)"
    rollout: Literal["auto", "vllm", "hf"] = opt("auto", "engine; auto: vLLM where CUDA and vllm are there, else hf")
    prompts_per_step: int = opt(256, "prompts kept a step (Sec. 4)")
    group_size: int = opt(4, "K, responses a prompt (Sec. 4)")
    temperature: float = opt(1.0, "of sampling (official)")
    filter: bool = opt(True, "online prompt filter (Sec. 3)")
    filter_low: float = opt(0.2, "least mean accuracy of a group, inclusive (official)")
    filter_high: float = opt(0.8, "largest mean accuracy of a group, inclusive (official)")
    drop_truncated: bool = opt(False, "also drop groups with a truncated response (official: off)")
    oversample: float = opt(1.0, "prompts drawn over those that the last pass rate asks for (official: 1)")
    max_draws: int = opt(20, "give up when a step has drawn this many times --prompts-per-step")
    rollout_batch: int = opt(256, "hf engine: sequences decoded at once")
    vllm_memory: float = opt(0.6, "vLLM engine: share of the GPU's memory (official: 0.7)")
    importance_cap: float = opt(0.0, "C > 0 weighs tokens by min(pi_trainer / pi_engine, C); 0: off, as published")
    verify_workers: Optional[int] = opt(None, "verifier processes a rank (default: the cores, shared by the ranks)")
    verify_timeout: float = opt(6.0, "seconds a test or an answer (official)")
    sandbox: Literal["auto", "bwrap", "limits"] = opt("auto", "isolation of programs; auto: bubblewrap, or refuse")

@dataclass
class RewardOptions:
    _argument_group_name = "reward and advantage (Sec. 3)"
    reward: Literal["prime", "outcome", "process"] = opt("prime", "which rewards enter; outcome: the RLOO baseline")
    beta: float = opt(0.05, "scale of the implicit reward, Eq. 3 (Sec. 4)")
    gamma: float = opt(1.0, "discount of process rewards, Eq. 5; outcomes are never discounted (official)")
    process_weight: float = opt(1.0, "factor of the process part of the advantage")
    outcome_weight: float = opt(1.0, "factor of the outcome part of the advantage")
    estimator: Literal["rloo", "reinforce", "grpo", "ppo"] = opt("rloo", "advantage estimator (Eq. 5, 7, 8; Table 4)")
    process_baseline: Literal["token-mean", "official"] = opt("token-mean", "Eq. 5's text; official: its K/(K-1) form")
    granularity: Literal["token", "whole"] = opt("token", "process reward a token, or R_phi(y) as a second outcome")
    prm_role: Literal["reward", "value"] = opt("reward", "value: A_t = r_o - v_phi(y_<t) (Sec. 5)")
    normalize: bool = opt(True, "divide process rewards by the batch's largest |reward-to-go| (official)")
    whiten: bool = opt(True, "whiten advantages over the batch's tokens (official)")

@dataclass
class PRMOptions:
    _argument_group_name = "implicit PRM (Sec. 3, 5)"
    prm_lr: float = opt(1e-6, "constant learning rate (Sec. 4)")
    prm_weight_decay: float = opt(0.0, "of AdamW (official)")
    prm_grad_clip: float = opt(10.0, "largest gradient norm (official; norms near 20 are normal at first)")
    prm_minibatch: int = opt(256, "responses an update, whole groups (Sec. 4: 4 updates a step)")
    prm_update: Literal["single", "score-first", "double", "none"] = opt(
        "single", "what scores a response: its own training forward (single), the PRM before any update (score-first) or "
                  "after all (double); none: a frozen, offline PRM (Sec. 5)")
    prm_loss: Literal["ce", "dpo"] = opt("ce", "cross-entropy, or DPO on the pairs of a group (Table 8)")
    prm_warmup_steps: int = opt(0, "first steps train the PRM only, the policy held")
    prm_probe_every: int = opt(0, "every N steps also score all rollouts before filter and update (0: never)")

@dataclass
class PolicyOptions:
    _argument_group_name = "policy update (Sec. 3.2)"
    lr: float = opt(5e-7, "constant learning rate (Sec. 4)")
    weight_decay: float = opt(0.01, "of AdamW (official)")
    grad_clip: float = opt(1.0, "largest gradient norm (official)")
    minibatch: int = opt(256, "responses an update, shuffled (Sec. 4: 4 updates a step)")
    ppo_epochs: int = opt(1, "passes over a batch (official)")
    clip: float = opt(0.2, "epsilon of Eq. 6 (official)")
    loss_average: Literal["token", "sequence"] = opt("token", "over a minibatch's tokens, or its responses (official)")
    critic_lr: float = opt(1e-5, "of PPO's critic (not published)")

@dataclass
class SFTOptions:
    _argument_group_name = "SFT warm-up (App. D)"
    sft_data: Optional[str] = opt(None, "train --model on this first: Eurus-2-SFT-Data's schema, or prompt and response")
    sft_epochs: int = opt(3, "passes over it (App. D)")
    sft_batch: int = opt(96, "examples an update (App. D)")
    sft_lr: float = opt(1e-5, "peak learning rate: 10%% warm-up, then cosine (App. D)")
    sft_max_tokens: int = opt(6144, "longer examples are dropped and counted (official)")

@dataclass
class RunOptions:
    _argument_group_name = "run and evaluation"
    output: Optional[str] = opt(None, "run folder (default: runs/DATE-TIME)")
    resume: Optional[str] = opt(None, "run folder to go on with")
    steps: int = opt(592, "rollout steps (Table 1); 0: stop after SFT")
    seed: int = opt(42, "of prompts, sampling and shuffling")
    save_every: int = opt(16, "steps between checkpoints, 0: only the last (official)")
    eval_every: int = opt(16, "steps between evaluations, 0: only first and last (official)")
    eval_only: bool = opt(False, "evaluate --model on --eval-data, train nothing")
    eval_samples: int = opt(0, "besides greedy, N samples a problem: avg@N, pass@k, majority (Table 12: 16)")
    eval_temperature: float = opt(0.3, "of those samples (Table 12)")
    inspect: bool = opt(False, "evaluations write a page that shades tokens by process reward; needs --eval-samples")
    report_to: Literal["none", "tensorboard", "wandb"] = opt("none", "besides metrics.jsonl")

SECTIONS = (ModelOptions, DataOptions, RolloutOptions, RewardOptions, PRMOptions, PolicyOptions, SFTOptions, RunOptions)

@dataclass
class Config(*SECTIONS):
    """All options, flat."""

# The built-in experiment: what differs from the paper's values where --data is absent or 'miniature' ...
MINIATURE = dict(
    data="miniature", eval_data=["miniature-test"], template="none", max_prompt_tokens=16, max_response_tokens=48,
    dtype="float32", rollout="hf", rollout_batch=512, prompts_per_step=32, oversample=1.25, minibatch=128,
    prm_minibatch=128, lr=1e-4, prm_lr=2e-4, critic_lr=2e-4, steps=60, save_every=20, eval_every=0, eval_samples=4,
    eval_temperature=1.0, prm_probe_every=1, verify_workers=1)
# ... and without --model, whose SFT model is then made first, from nothing.
MINIATURE_SFT = dict(sft_data="miniature", sft_epochs=1, sft_batch=48, sft_lr=3e-3)

class UserError(Exception):
    """A user's mistake: one line that names the option and what would be right; exit code 2."""

def flag(name: str) -> str:
    """The option of a Config field."""
    return "--" + name.replace("_", "-")

def check_config(cfg: Config, world: int) -> None:
    """Raise UserError for values that cannot work, alone or together, on this many processes."""
    def need(right, message):
        if not right:
            raise UserError(message)

    for name in ("prompts_per_step", "group_size", "minibatch", "prm_minibatch", "token_budget", "max_response_tokens",
                 "max_prompt_tokens", "ppo_epochs", "rollout_batch", "sft_batch", "sft_epochs", "max_draws", "oversample"):
        need(getattr(cfg, name) >= 1, f"{flag(name)} must be at least 1, not {getattr(cfg, name)}")
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        need(not isinstance(value, (int, float)) or 0 <= value < math.inf, f"{flag(f.name)} must not be negative or infinite")
    need(cfg.gamma <= 1, "--gamma must be at most 1")
    need(0 < cfg.vllm_memory <= 1, "--vllm-memory is a share: above 0, at most 1")
    need(cfg.verify_timeout > 0 and cfg.verify_workers != 0, "--verify-timeout and --verify-workers must be positive")
    need(cfg.data or cfg.eval_only or not cfg.steps, "--data is missing: name the RL prompts (or --steps 0: SFT alone)")
    need(cfg.model or cfg.sft_data == cfg.data == "miniature", "--model is missing: name the SFT model to start from")
    need(not cfg.eval_only or cfg.eval_data, "--eval-only needs --eval-data: name one or several sets")
    need(not cfg.sft_data or cfg.sft_batch % world == 0, f"--sft-batch {cfg.sft_batch} is not a multiple of {world} processes")
    need(not cfg.inspect or cfg.eval_samples, "--inspect shows sampled responses: give --eval-samples")
    if cfg.eval_only:
        return
    need(cfg.group_size > 1 or cfg.estimator not in ("rloo", "grpo"),
         f"--group-size 1 leaves nothing to compare with: --estimator {cfg.estimator} needs at least 2")
    need(cfg.temperature > 0, "--temperature 0 samples the same response K times: give a positive one")
    need(cfg.filter_low <= cfg.filter_high <= 1, "--filter-low and --filter-high must satisfy low <= high <= 1")
    batch = cfg.prompts_per_step * cfg.group_size
    for name in ("minibatch", "prm_minibatch"):
        size = getattr(cfg, name)
        need(batch % size == 0, f"{flag(name)} {size} does not divide the batch of {batch} responses "
                                "(--prompts-per-step times --group-size)")
        need(size % world == 0, f"{flag(name)} {size} is not a multiple of the {world} processes")
    need(cfg.prm_minibatch % cfg.group_size == 0, f"--prm-minibatch {cfg.prm_minibatch} splits groups of {cfg.group_size}")
    need(cfg.prm_ref in ("sft", "policy"), "--prm-ref is 'sft' or 'policy' (a folder with --eval-only)")
    need(cfg.prm_ref == "sft" or cfg.temperature == 1, "--prm-ref policy needs --temperature 1")
    need(cfg.process_baseline == "token-mean" or cfg.estimator == "rloo", "--process-baseline belongs to --estimator rloo")
    need(cfg.granularity == "token" or cfg.gamma == 1, "--granularity whole knows no --gamma")
    need(cfg.prm_loss == "ce" or cfg.group_size > 1, "--prm-loss dpo pairs the responses of a group: --group-size 2 or more")
    if cfg.prm_update == "none":
        need(cfg.prm_loss == "ce" and not cfg.prm_warmup_steps, "--prm-update none: drop --prm-loss and --prm-warmup-steps")
        need(cfg.prm or cfg.reward == "outcome", "--prm-update none leaves the SFT model as PRM, all rewards 0: name a --prm")
    if cfg.prm_role == "value":
        need(cfg.reward == "prime" and cfg.estimator == "rloo" and cfg.granularity == "token" and cfg.gamma == 1,
             "--prm-role value replaces the estimator: leave --reward, --estimator, --granularity and --gamma alone")
    if cfg.reward == "outcome":
        for name in ("prm", "prm_ref", "prm_update", "prm_loss", "prm_warmup_steps", "granularity", "prm_role", "gamma"):
            need(getattr(cfg, name) == getattr(Config, name), f"--reward outcome has no process reward: drop {flag(name)}")

# ----------------------------------------------------------------------------------------------------------------------
# Problems: a prompt, and what its responses are verified against.

MATH_SUFFIX = "\n\nPut the final answer, in LaTeX, inside \\boxed{}."
CODE_SUFFIX = "\n\nWrite a Python program that solves this and put it in a ```python block at the end."
ZERO_TEMPLATE = ("User and Assistant talk. The Assistant first thinks, inside <think> </think>, then answers, inside "
                 "<answer> </answer>.\nUser: {}\nAssistant: ")

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

    prompt, task, reference = first("problem", "question", "prompt", "question_content"), "code", None
    if isinstance(row.get("reward_model"), dict):  # Eurus-2-RL-Data
        task, reference = row.get("ability"), row["reward_model"].get("ground_truth")
    elif first("tests", "input_output"):
        reference = first("tests", "input_output")
    elif isinstance(row.get("test"), str):  # LeetCode: a script of assertions
        reference = {"asserts": row["test"]}
    elif isinstance(row.get("public_test_cases"), str):  # LiveCodeBench
        cases = json.loads(row["public_test_cases"])
        reference = {"inputs": [c["input"] for c in cases], "outputs": [c["output"] for c in cases]}
        if cases and cases[0].get("testtype") == "functional":
            reference["fn_name"] = json.loads(row["metadata"])["func_name"]
    else:
        task, reference = "math", first("answer", "expected_answer", "final_answer")
        if isinstance(reference, list):  # OlympiadBench
            reference = ", ".join(map(str, reference))
        if reference is None and isinstance(row.get("solution"), str):  # MATH, Minerva: in the worked solution
            reference = verify.extract_answer(row["solution"])
        reference = None if reference is None else str(reference)
    if not prompt:
        raise UserError(f"{where}: no prompt (a column problem, question or prompt)")
    if reference in (None, "") or task not in ("math", "code"):
        raise UserError(f"{where}: no answer (a column answer, tests or reward_model), or ability neither math nor code")
    if isinstance(prompt, list):
        if not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt):
            raise UserError(f"{where}: a chat prompt is a list of messages with role and content")
        return Problem(prompt, task, reference)
    return Problem(str(prompt) + ((MATH_SUFFIX if task == "math" else CODE_SUFFIX) if suffix is None else suffix), task, reference)

def load_rows(name: str, option: str, split: str = "train"):
    """The rows of a .jsonl or .parquet file or of a hub data set: a list of dicts, or an Arrow table of them."""
    if name.endswith(".jsonl"):
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{option} {name}: cannot be read ({e})") from None
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as e:
                raise UserError(f"{option} {name}, line {number}: not JSON ({e})") from None
            if not isinstance(rows[-1], dict):
                raise UserError(f"{option} {name}, line {number}: not a JSON object")
        return rows
    if not find_spec("datasets"):
        raise UserError(f"{option} {name}: pip install datasets, or give a .jsonl file")
    import datasets
    try:
        if name.endswith(".parquet"):
            return datasets.Dataset.from_parquet(name)
        splits = datasets.load_dataset(name)
        return splits[split] if split in splits else next(iter(splits.values()))
    except Exception as e:  # the hub client raises dozens of kinds
        raise UserError(f"{option} {name}: cannot be loaded ({str(e).strip().splitlines()[0][:200]})") from None

class Problems:
    """A sequence of Problem over one data set, each row converted when asked for."""

    def __init__(self, name: str, cfg: Config, split: str = "train", option: str = "--data"):
        self.name, self.suffix = name, cfg.prompt_suffix
        self.rows = miniature_rows(name, option) if name.startswith("miniature") else load_rows(name, option, split)
        if not len(self.rows):
            raise UserError(f"{option} {name} holds no rows")
        for i in range(len(self.rows)) if isinstance(self.rows, list) else ():
            self[i]  # name a bad line now, not in the middle of the night

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i: int) -> Problem:
        return problem_from_row(self.rows[i], f"{self.name}, line {i + 1}", "" if self.name.startswith("miniature") else self.suffix)

def encode_prompt(prompt: list | str, tokenizer, cfg: Config) -> list[int]:
    """Token ids of a prompt in the format of --template; the chat template is applied exactly once."""
    if cfg.template != "chat":
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        text = ZERO_TEMPLATE.format(text) if cfg.template == "zero" else text
        return tokenizer(text, add_special_tokens=cfg.template == "zero")["input_ids"]
    if not tokenizer.chat_template:
        raise UserError("--template chat: the model's tokenizer has no chat template; give --template zero or none")
    return tokenizer.apply_chat_template(as_chat(prompt, cfg), add_generation_prompt=True, return_dict=True)["input_ids"]

def as_chat(prompt: list | str, cfg: Config) -> list[dict]:
    """A prompt as chat messages."""
    if isinstance(prompt, list):
        return prompt
    system = [{"role": "system", "content": cfg.system_prompt}] if cfg.system_prompt else []
    return system + [{"role": "user", "content": prompt}]

class PromptQueue:
    """Prompts in shuffled epochs, drawn in one global order; prompts put back come first. Its state is JSON."""

    def __init__(self, problems: Problems, tokenizer, cfg: Config):
        self.problems, self.tokenizer, self.cfg = problems, tokenizer, cfg
        self.load({"epoch": 0, "position": 0, "head": [], "pass_rate": 1.0, "too_long": 0})

    def load(self, state: dict):
        """Go on from a saved state."""
        self.state = state
        self.order = random.Random(f"{self.cfg.seed} {state['epoch']}").sample(range(len(self.problems)), len(self.problems))

    def draw(self, n: int) -> list[tuple[int, list[int]]]:
        """The next n prompts that are short enough, as (problem index, token ids)."""
        drawn, skipped, state = [], 0, self.state
        while len(drawn) < n:
            if not state["head"] and state["position"] == len(self.order):
                self.load(state | {"epoch": state["epoch"] + 1, "position": 0})
                state = self.state
            if state["head"]:
                index = state["head"].pop(0)
            else:
                index = self.order[state["position"]]
                state["position"] += 1
            ids = encode_prompt(self.problems[index].prompt, self.tokenizer, self.cfg)
            if len(ids) <= self.cfg.max_prompt_tokens:
                drawn.append((index, ids))
                skipped = 0
            else:
                state["too_long"] += 1
                skipped += 1
                if skipped >= len(self.problems):
                    raise UserError(f"--max-prompt-tokens {self.cfg.max_prompt_tokens}: all {skipped} prompts are longer")
        return drawn

    def put_back(self, indices: list[int]):
        """Return prompts whose rollouts were not used to the head of the queue."""
        self.state["head"] = indices + self.state["head"]

# The miniature: chains of six operations mod 10, worked from left to right. `9-5*8+7+0+1-7=` is answered by
# `9-5=4,4*8=2,2+7=9,9+0=9,9+1=0,0-7=3,\boxed{3}`.

MINIATURE_SIZES = {"miniature-test": 512, "miniature-val": 512, "miniature": 20000}  # disjoint, fixed

def miniature_question(rng: random.Random) -> str:
    return str(rng.randrange(10)) + "".join(rng.choice("+-*") + str(rng.randrange(10)) for _ in range(6)) + "="

def miniature_solution(question: str, fact=lambda a, op, b, right: right) -> list[str]:
    """Each step `a+b=c` of a chain; fact may write another result than the right one."""
    value, steps = int(question[0]), []
    for op, b in re.findall(r"([-+*])(\d)", question):
        right = {"+": value + int(b), "-": value - int(b), "*": value * int(b)}[op] % 10
        result = fact(value, op, int(b), right)
        steps.append(f"{value}{op}{b}={result}")
        value = result
    return steps

def miniature_rows(name: str, option: str = "--data") -> list[dict]:
    """The problems of one of MINIATURE_SIZES."""
    if name not in MINIATURE_SIZES:
        raise UserError(f"{option} {name}: the built-in sets are {', '.join(MINIATURE_SIZES)}")
    rng, questions = random.Random("miniature"), {}
    while len(questions) < sum(MINIATURE_SIZES.values()):
        questions[miniature_question(rng)] = None
    names, questions = list(MINIATURE_SIZES), list(questions)
    start = sum(MINIATURE_SIZES[n] for n in names[:names.index(name)])
    return [{"prompt": q, "answer": miniature_solution(q)[-1][-1]} for q in questions[start:start + MINIATURE_SIZES[name]]]

def miniature_sft_rows(seed: int, n: int = 33600) -> list[dict]:
    """Worked solutions of a fallible teacher: a fixed fifth of the 300 facts is wrong 60% of the time, the rest 5%."""
    rng, rows = random.Random(f"teacher {seed}"), []
    held_out = {row["prompt"] for name in ("miniature-val", "miniature-test") for row in miniature_rows(name)}
    facts = [(a, op, b) for a in range(10) for op in "+-*" for b in range(10)]
    misbelief = {f: rng.randrange(1, 10) for f in rng.sample(facts, len(facts) // 5)}

    def fact(a, op, b, right):
        if (a, op, b) in misbelief and rng.random() < 0.6:
            return (right + misbelief[a, op, b]) % 10
        return rng.randrange(10) if rng.random() < 0.05 else right

    while len(rows) < n:
        question = miniature_question(rng)
        if question not in held_out:
            steps = miniature_solution(question, fact)
            rows.append({"prompt": question, "response": ",".join(steps) + f",\\boxed{{{steps[-1][-1]}}}"})
    return rows

def make_miniature_model(folder: Path, seed: int) -> None:
    """Write a randomly initialised Llama of 0.3M parameters and its tokenizer as an ordinary transformers folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    vocab = ["<pad>", "<eos>", "<unk>", "\\boxed{", "}", ",", "=", "+", "-", "*", *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
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
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3), **alone)

def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

def gather(item) -> list:
    """Every rank's item, on every rank."""
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items

class TokenModel(nn.Module):
    """A causal LM whose forward yields one number a response token: its log-probability, or a critic's V(y_<t)."""

    def __init__(self, lm, value_head: bool = False):
        super().__init__()
        self.lm = lm
        self.value_head = nn.Linear(lm.config.hidden_size, 1, bias=False) if value_head else None

    def forward(self, ids: Tensor, predicts: Tensor, temperature: float = 1.0) -> Tensor:
        """ids (b, L), padded on the right; predicts (b, L-1), true where the next token is wanted -> (n,) float32.

        Causal attention never looks at padding on the right, so no attention mask is needed or built.
        """
        hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][predicts]
        if self.value_head is not None:
            return self.value_head(hidden).squeeze(-1).float()
        weight, targets = self.lm.get_output_embeddings().weight, ids[:, 1:][predicts]
        chunks = zip(hidden.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK))
        return torch.cat([checkpoint(chunk_logps, h, weight, t, temperature, use_reentrant=False) for h, t in chunks])

def chunk_logps(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(hidden weight^T / temperature) at the targets, float32: (n, d), (V, d), (n,) -> (n,)."""
    logits = F.linear(hidden, weight).float() / temperature
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

def from_pretrained(loader, name: str, option: str, **kwargs):
    """loader.from_pretrained(name), with its many errors in one line."""
    try:
        return loader.from_pretrained(name, **kwargs)
    except Exception as e:  # the hub client and transformers raise dozens of kinds
        raise UserError(f"{option} {name}: cannot be loaded ({str(e).strip().splitlines()[0][:200]})") from None

def load_model(name: str, cfg: Config, option: str = "--model", frozen: bool = False, value_head: bool = False) -> TokenModel:
    """Shard a model over the ranks. Rank 0 reads it and deals its parameters out one by one; the others never hold it.

    Trained weights are float32 and computed with in --dtype; a frozen model is stored in --dtype: the same numbers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    compute = getattr(torch, cfg.dtype)
    config = from_pretrained(AutoConfig, name, option)
    if any(getattr(config, key, None) not in (None, 0, 1) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
        raise UserError(f"{option} {name}: models that scale their logits are not supported")
    for key in [key for key in config.to_dict() if key.endswith(("dropout", "pdrop"))]:
        setattr(config, key, 0.0)
    source, values = None, {}
    if dist.get_rank() == 0:
        source = from_pretrained(AutoModelForCausalLM, name, option, config=config, dtype=torch.float32)
        values = dict(TokenModel(source).named_parameters()) | dict(TokenModel(source).named_buffers())
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=compute if frozen else torch.float32)
        model = TokenModel(lm, value_head).train()  # checkpointing asks for training mode; there is no dropout
    if cfg.activation_checkpointing and not frozen:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    plan = dict(mesh=dist.device_mesh.init_device_mesh(device().type, (dist.get_world_size(),)),
                mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
                offload_policy=CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy())
    for block in lm.base_model.layers:
        fully_shard(block, **plan)
    fully_shard(model, **plan)
    model.to_empty(device="cpu" if cfg.cpu_offload else device())
    with torch.no_grad():
        for key, p in model.named_parameters():
            full = torch.zeros(p.shape, dtype=p.dtype, device=device())
            if key in values:  # on rank 0; a critic's head starts from zero
                full.copy_(values[key])
            p.to_local().copy_(distribute_tensor(full, p.device_mesh, p.placements).to_local())
        for key, b in list(model.named_buffers()):  # rotary frequencies are in no state dict
            full = values[key].to(device()) if values else torch.empty_like(b, device=device())
            dist.broadcast(full, 0)
            owner, _, leaf = key.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = full
    lm.generation_config = source.generation_config if source else None
    return model.requires_grad_(not frozen)

def full_weights(model: TokenModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Stream a sharded model's (name, whole tensor) pairs, one at a time; every rank must run through all of them."""
    for name, p in model.lm.named_parameters():
        yield name, p.detach().to(device=device(), dtype=dtype).full_tensor()

def save_pretrained(model: TokenModel, tokenizer, folder: Path, **notes) -> None:
    """Write an ordinary transformers folder, complete or not at all; notes go into its implicit_prm.json."""
    main, weights = dist.get_rank() == 0, {}
    for name, tensor in full_weights(model, torch.float32):
        if main:
            weights[name] = tensor.cpu()
    if main:
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
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm.full_tensor())

@dataclass
class Models:
    """What train updates, and the frozen reference; None where the options need none."""
    policy: Learner
    prm: Optional[Learner] = None
    ref: Optional[TokenModel] = None
    critic: Optional[Learner] = None

    @property
    def learners(self) -> dict[str, Learner]:
        """What a checkpoint holds."""
        return {name: learner for name in ("policy", "prm", "critic") if (learner := getattr(self, name))}

def load_models(name: str, cfg: Config) -> Models:
    """Policy, PRM and reference, all from the model called name (Alg. 1), and PPO's critic."""
    models = Models(Learner(load_model(name, cfg), cfg.lr, cfg.weight_decay, cfg.grad_clip))
    if cfg.reward != "outcome":
        models.prm = Learner(load_model(cfg.prm or name, cfg, "--prm"), cfg.prm_lr, cfg.prm_weight_decay, cfg.prm_grad_clip)
        models.ref = load_model(name, cfg, frozen=True) if cfg.prm_ref == "sft" else None
    if cfg.estimator == "ppo":
        models.critic = Learner(load_model(name, cfg, value_head=True), cfg.critic_lr, 0.0, cfg.grad_clip)
    return models

@dataclass
class Batch:
    """B responses on every rank: whole token sequences, and tensors over response positions."""
    tokens: list[Tensor]  # prompt and response
    prompt_lengths: list[int]
    mask: Tensor  # (B, T)
    outcomes: Tensor  # (B,)
    engine_logps: Tensor  # (B, T)

    @staticmethod
    def of(rollouts: list["Rollout"]) -> "Batch":
        """Rollouts as tensors."""
        def padded(rows):
            return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device())

        return Batch(tokens=[torch.tensor(r.prompt_ids + r.ids, device=device()) for r in rollouts],
                     prompt_lengths=[len(r.prompt_ids) for r in rollouts],
                     mask=padded([[1.0] * len(r.ids) for r in rollouts]),
                     outcomes=torch.tensor([r.outcome for r in rollouts], device=device()),
                     engine_logps=padded([r.logps for r in rollouts]))

    def blocks(self, size: int) -> list[range]:
        """Consecutive minibatches of size responses: whole groups, unshuffled."""
        return [range(len(self.tokens))[start:start + size] for start in range(0, len(self.tokens), size)]

def micro_batches(lengths: list[int], token_budget: int, world: int = 1) -> list[list[int]]:
    """Cut sequences, longest first, into micro-batches of similar length.

    Each of the world ranks takes every world-th row of a micro-batch: at most token_budget tokens with padding, or one
    row. Where world does not divide the number of sequences, the last one stands in several times.
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
    rows = list(rows)
    for block in micro_batches([len(batch.tokens[i]) for i in rows], cfg.token_budget, dist.get_world_size()):
        yield [rows[i] for i in block[dist.get_rank()::dist.get_world_size()]]

def token_values(model: TokenModel, batch: Batch, rows: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities (or values) of the given rows' response tokens: (len(rows), T), zero outside the mask."""
    ids = nn.utils.rnn.pad_sequence([batch.tokens[i] for i in rows], batch_first=True)
    first = torch.tensor([[batch.prompt_lengths[i] - 1] for i in rows], device=ids.device)
    end = torch.tensor([[len(batch.tokens[i]) - 1] for i in rows], device=ids.device)
    position = torch.arange(ids.shape[1] - 1, device=ids.device)
    values = model(ids, (first <= position) & (position < end), temperature)
    return torch.zeros_like(batch.mask[rows]).masked_scatter(batch.mask[rows].bool(), values)

def assemble(pieces: list[tuple[list[int], Tensor]], batch: Batch) -> Tensor:
    """Each rank's (rows, (len(rows), T)) pieces -> the detached (B, T) tensor, on every rank."""
    whole = torch.full_like(batch.mask, -torch.inf)
    for rows, values in pieces:
        whole[rows] = values.detach()
    dist.all_reduce(whole, dist.ReduceOp.MAX)
    return whole.masked_fill(batch.mask == 0, 0.0)

@torch.no_grad()
def score(model: TokenModel, batch: Batch, cfg: Config, minibatch: Optional[int] = None, temperature: float = 1.0) -> Tensor:
    """token_values of the whole batch without gradients: (B, T), on every rank.

    It is cut as a training pass with this minibatch would cut it, so that equal weights give equal numbers.
    """
    return assemble([(mine, token_values(model, batch, mine, temperature))
                     for rows in batch.blocks(minibatch or len(batch.tokens)) for mine in my_micro_batches(batch, rows, cfg)], batch)

# ----------------------------------------------------------------------------------------------------------------------
# Rollout (Sec. 3): two engines with one small interface, verification beside generation, the online prompt filter.

@dataclass
class Rollout:
    """One response: its tokens, the engine's log-probabilities of them, and its verified outcome in [0, 1]."""
    index: int  # of the problem
    prompt_ids: list[int]
    ids: list[int]
    logps: list[float]
    truncated: bool = False
    text: str = ""
    outcome: float = 0.0

class HFEngine:
    """Samples with transformers, from an unsharded copy of the policy on each rank."""

    def __init__(self, name: str, cfg: Config, stop_ids: list[int]):
        from transformers import AutoModelForCausalLM
        self.lm = from_pretrained(AutoModelForCausalLM, name, "--model", dtype=getattr(torch, cfg.dtype)).to(device()).eval()
        self.stop_ids, self.batch = torch.tensor(stop_ids, device=device()), cfg.rollout_batch

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the policy's weights."""
        own = dict(self.lm.named_parameters())
        for name, tensor in weights:
            own[name].copy_(tensor)

    def sleep(self) -> None:
        """Nothing to free."""

    close = sleep

    def generate(self, prompts: list[list[int]], k: int, max_tokens: int, temperature: float, seed: int) -> Iterator[tuple]:
        """K responses a prompt of token ids; yields (prompt number, ids, logps, truncated) as each one ends.

        temperature 0 is greedy. Prompts of one length run without padding; finished rows leave the batch at once.
        """
        rng = torch.Generator(device()).manual_seed(seed)
        order, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), max(1, self.batch // k)
        for start in range(0, len(order), size):
            yield from self.decode([(i, prompts[i]) for i in order[start:start + size]], k, max_tokens, temperature, rng)

    @torch.no_grad()
    def decode(self, chunk, k, max_tokens, temperature, rng):
        """generate for one batch of (number, prompt)."""
        width = max(len(p) for _, p in chunk)
        ids = torch.tensor([[0] * (width - len(p)) + p for _, p in chunk], device=device())
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for _, p in chunk], device=device())
        padded = not bool(mask.all())
        out = self.lm(input_ids=ids, attention_mask=mask if padded else None, use_cache=True, logits_to_keep=1,
                      position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        cache, logits, mask = out.past_key_values, out.logits[:, -1].repeat_interleave(k, 0), mask.repeat_interleave(k, 0)
        cache.batch_repeat_interleave(k)  # the prompt was read once for its k responses
        alive = torch.arange(len(mask), device=device())  # the rows that still run
        tokens = torch.zeros(len(mask), max_tokens, dtype=torch.long, device=device())
        logps = torch.zeros(len(mask), max_tokens, device=device())
        for t in range(max_tokens):
            log_probs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
            token = torch.multinomial(log_probs.exp(), 1, generator=rng) if temperature else log_probs.argmax(-1, keepdim=True)
            tokens[alive, t], logps[alive, t] = token[:, 0], log_probs.gather(-1, token)[:, 0]
            stopped = torch.isin(token[:, 0], self.stop_ids)
            ended = stopped if t + 1 < max_tokens else torch.ones_like(stopped)
            if ended.any():
                for row, stop in zip(alive[ended].tolist(), stopped[ended].tolist()):
                    yield chunk[row // k][0], tokens[row, :t + 1].tolist(), logps[row, :t + 1].tolist(), not stop
                going = (~ended).nonzero()[:, 0]
                if not len(going):
                    return
                alive, token, mask = alive[going], token[going], mask[going]
                cache.batch_select_indices(going)
            mask = F.pad(mask, (0, 1), value=1)
            logits = self.lm(input_ids=token, attention_mask=mask if padded else None, past_key_values=cache, use_cache=True,
                             position_ids=mask.sum(-1, keepdim=True) - 1).logits[:, -1]

class VLLMEngine:
    """Samples with vLLM, one engine in each rank's process (data-parallel rollouts), asleep while training."""

    def __init__(self, name: str, cfg: Config, stop_ids: list[int]):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in process: weights pass by reference, no process is left over
        try:
            import vllm
        except ImportError as e:
            raise UserError(f"--rollout vllm: vllm cannot be imported ({e}); pip install vllm, or --rollout hf") from None
        self.cuda, self.asleep, self.requests = torch.cuda.is_available(), False, 0
        self.params = lambda **kwargs: vllm.SamplingParams(logprobs=0, stop_token_ids=stop_ids, detokenize=False, **kwargs)
        launcher = {"distributed_executor_backend": "external_launcher"} if "RANK" in os.environ else {}
        self.llm = vllm.LLM(
            name, dtype=cfg.dtype, max_model_len=cfg.max_prompt_tokens + cfg.max_response_tokens, seed=cfg.seed,
            gpu_memory_utilization=cfg.vllm_memory, enable_sleep_mode=self.cuda, enforce_eager=not self.cuda,
            logprobs_mode="processed_logprobs", disable_log_stats=True, **launcher)

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Wake, and take the policy's weights."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.cuda:  # the CPU build computes with a packed copy of a tied head, which the reload leaves stale
            self.llm.apply_model(repack_tied_head)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()
        self.asleep = False

    def sleep(self) -> None:
        """Give the GPU to training. Level 2 drops the weights too: each sync sends them anyway."""
        if self.cuda:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        """Shut the engine down; this also ends torch.distributed, so it comes last."""
        self.llm.llm_engine.engine_core.shutdown()

    def generate(self, prompts: list[list[int]], k: int, max_tokens: int, temperature: float, seed: int) -> Iterator[tuple]:
        """As HFEngine.generate."""
        torch.manual_seed(seed)  # the engine draws from this process's default generators
        engine, owner = self.llm.llm_engine, {}
        for i in [i for i in range(len(prompts)) for _ in range(k)]:
            self.requests += 1
            owner[str(self.requests)] = i
            params = self.params(temperature=temperature, max_tokens=max_tokens)
            engine.add_request(str(self.requests), {"prompt_token_ids": prompts[i]}, params)
        while engine.has_unfinished_requests():
            for request in engine.step():
                if request.finished:
                    out = request.outputs[0]
                    logps = [step[token].logprob for step, token in zip(out.logprobs, out.token_ids)]
                    yield owner[request.request_id], list(out.token_ids), logps, out.finish_reason == "length"

def repack_tied_head(model) -> None:
    """Refresh what vLLM's CPU build computes a tied head's logits with."""
    if getattr(model.config, "tie_word_embeddings", False):
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

def make_engine(name: str, tokenizer, cfg: Config):
    """The engine that --rollout asks for."""
    from transformers import GenerationConfig
    stop = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):  # a model may lack a generation_config.json
        ids = GenerationConfig.from_pretrained(name).eos_token_id
        stop |= set(ids if isinstance(ids, list) else [ids])
    vllm = cfg.rollout == "vllm" or cfg.rollout == "auto" and torch.cuda.is_available() and find_spec("vllm")
    return (VLLMEngine if vllm else HFEngine)(name, cfg, sorted(stop - {None}))

@dataclass
class Sampler:
    """What turns prompts into verified rollouts."""
    engine: HFEngine | VLLMEngine
    verifier: verify.Verifier
    tokenizer: object
    cfg: Config
    policy: Optional[TokenModel]  # None: the engine's own weights are the ones wanted

    @classmethod
    @contextlib.contextmanager
    def open(cls, name: str, tokenizer, cfg: Config, policy: Optional[TokenModel] = None):
        """Start the engine and the verifier; stop both at the end, the engine last."""
        engine = make_engine(name, tokenizer, cfg)
        try:
            with verify.Verifier(cfg.verify_workers, cfg.verify_timeout, sandbox=cfg.sandbox) as verifier:
                yield cls(engine, verifier, tokenizer, cfg, policy)
        finally:
            engine.close()

    @contextlib.contextmanager
    def awake(self):
        """The engine awake, with the policy's weights; asleep afterwards."""
        if self.policy is not None:
            self.engine.sync(full_weights(self.policy, getattr(torch, self.cfg.dtype)))
        yield
        if self.policy is not None:
            self.engine.sleep()

    def sample(self, problems: Problems, prompts: list[tuple[int, list[int]]], k: int, temperature: float, seed: str,
               bar: Optional[tqdm] = None) -> list[list[Rollout]]:
        """K verified rollouts of each (problem index, token ids), in the order given, on every rank.

        The prompts are dealt over the ranks; a response goes to the verifier while others are still being generated.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        mine, pending = prompts[rank::world], []
        groups = [[] for _ in mine]
        number = random.Random(f"{self.cfg.seed} {seed} rank {rank}").getrandbits(31)
        for i, ids, logps, truncated in self.engine.generate(
                [ids for _, ids in mine], k, self.cfg.max_response_tokens, temperature, number):
            (index, prompt_ids), text = mine[i], self.tokenizer.decode(ids, skip_special_tokens=True)
            groups[i].append(Rollout(index, prompt_ids, ids, logps, truncated, text))
            try:
                future = self.verifier.submit(text, problems[index].task, problems[index].reference)
            except RuntimeError as e:  # no sandbox for programs
                raise UserError(f"--sandbox {self.cfg.sandbox}: {e}") from None
            pending.append((groups[i][-1], future))
            if bar is not None:
                bar.update(world)
        for rollout, future in pending:
            rollout.outcome = float(future.result())
        parts = gather(groups)
        return [parts[i % world][i // world] for i in range(len(prompts))]

def accuracy_filter(outcomes: Tensor, group_size: int, low: float, high: float) -> Tensor:
    """Online prompt filter (Sec. 3): outcomes (P*K,) -> (P,) bool, mean accuracy in [low, high] to 1e-6."""
    accuracy = outcomes.view(-1, group_size).double().mean(-1)
    return (accuracy >= low - 1e-6) & (accuracy <= high + 1e-6)

def collect_rollouts(sampler: Sampler, queue: PromptQueue, cfg: Config, step: int) -> tuple[list[Rollout], list[Rollout], dict]:
    """Algorithm 1's sampling: draw, verify and filter groups until the batch is full.

    Groups are accepted in the order drawn. Surplus groups' prompts return to the queue, their rollouts are dropped.
    Returns (rollouts kept, all rollouts considered, metrics).
    """
    kept, considered, drawn = [], [], 0
    while len(kept) < cfg.prompts_per_step:
        if drawn >= cfg.max_draws * cfg.prompts_per_step:
            accuracy = sum(r.outcome for group in considered for r in group) / (len(considered) * cfg.group_size)
            raise UserError(f"--data {cfg.data}: only {len(kept)} of {cfg.prompts_per_step} prompts passed the filter in {drawn} "
                            f"draws, mean accuracy {accuracy:.2f}; fitting problems, wider --filter-low and --filter-high or "
                            "a larger --max-draws would help")
        missing = cfg.prompts_per_step - len(kept)
        prompts = queue.draw(math.ceil(missing * cfg.oversample / queue.state["pass_rate"]))
        groups = sampler.sample(queue.problems, prompts, cfg.group_size, cfg.temperature, f"step {step} draw {drawn}")
        drawn += len(prompts)
        for n, group in enumerate(groups):
            if len(kept) == cfg.prompts_per_step:
                queue.put_back([index for index, _ in prompts[n:]])
                break
            considered.append(group)
            fits = not cfg.filter or accuracy_filter(torch.tensor([r.outcome for r in group]), cfg.group_size,
                                                     cfg.filter_low, cfg.filter_high).item()
            if fits and not (cfg.drop_truncated and any(r.truncated for r in group)):
                kept.append(group)
        queue.state["pass_rate"] = max(0.1, len(kept) / len(considered))
    responses = [r for group in considered for r in group]
    count = len(responses)
    return [r for group in kept for r in group], responses, {
        "rollout/accuracy": sum(r.outcome for r in responses) / count, "rollout/kept_prompts": len(kept),
        "rollout/considered_prompts": len(considered), "rollout/drawn_prompts": drawn,
        "rollout/equal_groups": sum(len({r.outcome for r in group}) == 1 for group in kept),
        "rollout/truncated": sum(r.truncated for r in responses) / count,
        "rollout/length": sum(len(r.ids) for r in responses) / count,
        "rollout/too_long_prompts": queue.state["too_long"], "rollout/epoch": queue.state["epoch"]}

# ----------------------------------------------------------------------------------------------------------------------
# Implicit process reward (Eq. 3) and the PRM's loss. From here on the mathematics: tensors in, tensors out.

NORM_FLOOR = 1e-3  # a batch whose largest |reward-to-go| is below this holds rounding noise, not rewards

def implicit_rewards(prm_logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_phi(y_t) = beta * log(pi_phi(y_t | y_<t) / pi_ref(y_t | y_<t)), Eq. 3. All (B, T); zero outside the mask."""
    return beta * (prm_logps - ref_logps) * mask

def prm_loss(process_rewards: Tensor, outcomes: Tensor, mask: Tensor, denominator: Optional[float] = None) -> Tensor:
    """Cross-entropy of sigma(R_phi(y)), R_phi = sum_t r_phi(y_t), on outcomes (B,) in [0, 1]: (B, T) -> ().

    denominator: responses of the global minibatch (default: of this call), so that micro-batches add up to its mean.
    """
    logits = (process_rewards * mask).sum(-1)
    return F.binary_cross_entropy_with_logits(logits, outcomes, reduction="sum") / (denominator or len(outcomes))

def dpo_loss(sequence_rewards: Tensor, outcomes: Tensor, group_size: int) -> Tensor:
    """-log sigma(R_i - R_j), mean over the pairs of a group with r_o(i) > r_o(j) (Table 8): (B,), (B,) -> ()."""
    rewards, outcomes = sequence_rewards.view(-1, group_size), outcomes.view(-1, group_size)
    margins = (rewards[:, :, None] - rewards[:, None, :])[outcomes[:, :, None] > outcomes[:, None, :]]
    return -F.logsigmoid(margins).sum() / max(1, margins.numel())

def normalize_rewards(process_rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, T) process rewards over the batch's largest |reward-to-go| (official); below NORM_FLOOR they stay as they are."""
    largest = discounted_returns(process_rewards * mask, 1.0).abs().max()
    return process_rewards / largest if largest >= NORM_FLOOR else process_rewards

def prm_metrics(sequence_rewards: Tensor, outcomes: Tensor, group_size: int) -> dict[str, float]:
    """How well R_phi (B,) tells right (outcome above 1/2) from wrong. Chance is 0.5 for auc and for pair_accuracy, over the
    pairs of a group whose outcomes differ; accuracy is to be read beside the majority's share."""
    def ordered(high, low, pairs):
        margins = (high - low)[pairs]
        return float(((margins > 0) + 0.5 * (margins == 0)).mean()) if margins.numel() else 0.5

    right, share = outcomes > 0.5, float((outcomes > 0.5).float().mean())
    r, o = sequence_rewards.view(-1, group_size), outcomes.view(-1, group_size)
    return {"auc": ordered(sequence_rewards[:, None], sequence_rewards[None, :], right[:, None] & ~right[None, :]),
            "pair_accuracy": ordered(r[:, :, None], r[:, None, :], o[:, :, None] > o[:, None, :]),
            "accuracy": float(((sequence_rewards > 0) == right).float().mean()), "majority": max(share, 1 - share)}

def score_and_update_prm(prm: Optional[Learner], ref_logps: Optional[Tensor], batch: Batch,
                         cfg: Config) -> tuple[Optional[Tensor], dict]:
    """The batch's process rewards (B, T), detached, the PRM's updates on its outcomes, and metrics; None without a PRM.

    --prm-update says which PRM scores a response: single, the forward of its own training minibatch (as published);
    score-first, the PRM before any update; double, the PRM after all; none, a PRM that is never updated.
    """
    if prm is None:
        return None, {}
    scores = score(prm.model, batch, cfg, cfg.prm_minibatch) if cfg.prm_update in ("score-first", "none") else None
    passes, losses, norms = [], [], []
    for rows in batch.blocks(cfg.prm_minibatch) if cfg.prm_update != "none" else []:
        loss = torch.zeros((), device=batch.mask.device)
        if cfg.prm_loss == "dpo":  # dL/dR_phi(y) from a pass without gradients, so that micro-batches may split groups
            logps = score(prm.model, batch, cfg, cfg.prm_minibatch)
            sums = implicit_rewards(logps, ref_logps, batch.mask, cfg.beta).sum(-1).requires_grad_()
            loss = dpo_loss(sums[rows], batch.outcomes[rows], cfg.group_size)
            slope, = torch.autograd.grad(loss, sums)
        for mine in my_micro_batches(batch, rows, cfg):
            logps = token_values(prm.model, batch, mine)
            rewards = implicit_rewards(logps, ref_logps[mine], batch.mask[mine], cfg.beta)
            if cfg.prm_loss == "dpo":
                backward((rewards.sum(-1) * slope[mine]).sum())
            else:
                loss += backward(prm_loss(rewards, batch.outcomes[mine], batch.mask[mine], len(rows)))
            passes.append((mine, logps))
        losses.append(float(loss if cfg.prm_loss == "dpo" else total(loss)))
        norms.append(prm.update())
    if cfg.prm_update == "single":
        scores = assemble(passes, batch)
    elif cfg.prm_update == "double":
        scores = score(prm.model, batch, cfg, cfg.prm_minibatch)
    rewards = implicit_rewards(scores, ref_logps, batch.mask, cfg.beta)
    metrics = {f"prm/{key}": value for key, value in prm_metrics(rewards.sum(-1), batch.outcomes, cfg.group_size).items()}
    if norms:
        metrics |= {"prm/loss": sum(losses) / len(losses), "prm/first_loss": losses[0], "prm/grad_norm": sum(norms) / len(norms)}
    return rewards, metrics | {"reward/process": float(rewards.sum(-1).mean()), "reward/process_max": float(rewards.abs().max())}

# ----------------------------------------------------------------------------------------------------------------------
# Advantages (Sec. 3.2): each estimator is a process part plus an outcome part, (B, T).

def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """sum over s >= t of gamma^(s-t) * rewards_s along the last dimension, in log2(T) doubling steps."""
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

    A_t = sum_{s>=t} gamma^(s-t) [r_phi(y_s) - b_phi] + r_o - b_o; baselines are means over the other responses, b_phi of
    their token means (the text of Sec. 3.2; the printed formula sums). baseline "official" is the released code's
    r * K/(K-1) - (sum of all K token means)/(K-1), which stretches by K/(K-1) what varies inside a response.
    """
    assert group_size > 1, "leave-one-out needs two responses a prompt"
    means = token_means(process_rewards, mask)
    if baseline == "official":
        everyone = means.view(-1, group_size).sum(-1).repeat_interleave(group_size)
        centered = (process_rewards * group_size - everyone[:, None]) / (group_size - 1)
    else:
        centered = process_rewards - leave_one_out(means, group_size)[:, None]
    return (discounted_returns(centered * mask, gamma) + (outcomes - leave_one_out(outcomes, group_size))[:, None]) * mask

def reinforce_advantages(process_rewards: Tensor, outcomes: Tensor, mask: Tensor, group_size: int, gamma: float = 1.0,
                         baseline: str = "") -> Tensor:
    """Eq. 8: A_t = r_o + sum_{s>=t} gamma^(s-t) r_phi(y_s), without a baseline. Shapes as rloo_advantages."""
    return (discounted_returns(process_rewards * mask, gamma) + outcomes[:, None]) * mask

def grpo_advantages(process_rewards: Tensor, outcomes: Tensor, mask: Tensor, group_size: int, gamma: float = 1.0,
                    baseline: str = "") -> Tensor:
    """Eq. 7: outcomes standardised in their group, process rewards by the mean and std of the group's token means.

    Shapes as rloo_advantages. Standard deviations are unbiased; 1e-6 is added to them.
    """
    def standardise(values, by):
        groups = by.view(-1, group_size)
        mean, std = (x.repeat_interleave(group_size) for x in (groups.mean(-1), groups.std(-1) + 1e-6))
        return (values - mean[:, None]) / std[:, None]

    process_part = discounted_returns(standardise(process_rewards, token_means(process_rewards, mask)) * mask, gamma)
    return (process_part + standardise(outcomes[:, None], outcomes)) * mask

def gae_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: rewards, values V(y_<t), mask (B, T) -> advantages, returns (B, T)."""
    values = values * mask
    errors = (rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values) * mask  # V is zero behind the last token
    advantages = discounted_returns(errors, gamma * lam) * mask
    return advantages, advantages + values

def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit (unbiased) variance over all response tokens given: (B, T) -> (B, T), zero outside the mask."""
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean) ** 2 * mask).sum() / (mask.sum() - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask

ESTIMATORS = {"rloo": rloo_advantages, "reinforce": reinforce_advantages, "grpo": grpo_advantages}

def estimate_advantages(process_rewards: Optional[Tensor], batch: Batch, cfg: Config,
                        values: Optional[Tensor] = None) -> tuple[Tensor, Optional[Tensor]]:
    """The advantages (B, T) that the options ask for, and the targets (B, T) of PPO's critic, whose values (B, T) are given.

    process_rewards (B, T): None without a PRM.
    """
    mask, outcomes, targets, none = batch.mask, batch.outcomes, None, torch.zeros_like(batch.mask)
    rewards = none if process_rewards is None else process_rewards
    last = F.pad(mask, (0, 1)).diff(dim=-1) == -1  # each response's last token
    if cfg.prm_role == "value":  # v_phi(y_<t) is what the PRM credits the response with before token t
        advantages = (outcomes[:, None] - (rewards.cumsum(-1) - rewards)) * mask
        return whiten(advantages, mask) if cfg.whiten else advantages, None
    if cfg.granularity == "whole":
        rewards = last * rewards.sum(-1, keepdim=True)
    if cfg.normalize:
        rewards = normalize_rewards(rewards, mask)
    if cfg.estimator == "ppo":
        outcome_part, targets = gae_advantages(last * outcomes[:, None], values, mask, 1.0, 1.0)
        process_part = discounted_returns(rewards * mask, cfg.gamma) * mask
    else:
        estimator = ESTIMATORS[cfg.estimator]
        outcome_part = estimator(none, outcomes, mask, cfg.group_size)
        if cfg.granularity == "whole":  # R_phi(y) as a second outcome
            process_part = estimator(none, rewards.sum(-1), mask, cfg.group_size)
        else:
            process_part = estimator(rewards, none[:, 0], mask, cfg.group_size, cfg.gamma, cfg.process_baseline)
    advantages = process_part * (cfg.process_weight * (cfg.reward != "outcome")) \
        + outcome_part * (cfg.outcome_weight * (cfg.reward != "process"))
    return whiten(advantages, mask) if cfg.whiten else advantages, targets

# ----------------------------------------------------------------------------------------------------------------------
# Policy loss and update (Eq. 6).

def ppo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float,
             denominator: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """-sum min(rho A, clip(rho, 1-eps, 1+eps) A) / denominator, Eq. 6: all (B, T) -> loss and clip fraction, both ().

    denominator: tokens of the global minibatch (default: of this call). mask may hold weights in place of ones.
    """
    denominator = mask.sum() if denominator is None else denominator
    ratio = torch.exp(logps - old_logps)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -(torch.min(plain, clipped) * mask).sum() / denominator, ((clipped < plain) * mask).sum() / denominator

def backward(loss: Tensor) -> Tensor:
    """Backpropagate this rank's share of a loss over a global denominator; FSDP averages gradients over the ranks."""
    (loss * dist.get_world_size()).backward()
    return loss.detach()

def total(value: Tensor) -> Tensor:
    """Sum over the ranks."""
    dist.all_reduce(value)
    return value

def update_policy(policy: Learner, batch: Batch, advantages: Tensor, old_logps: Optional[Tensor], cfg: Config, step: int) -> dict:
    """PPO's clipped updates over shuffled minibatches of whole responses; returns metrics.

    old_logps (B, T): None where one update a batch makes the first forward's own log-probabilities the old ones.
    """
    order, passes, norms = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step), [], []
    weights = batch.mask / batch.mask.sum(-1, keepdim=True) if cfg.loss_average == "sequence" else batch.mask
    minibatches = [rows.tolist() for _ in range(cfg.ppo_epochs)
                   for rows in torch.randperm(len(batch.tokens), generator=order).split(cfg.minibatch)]
    sums = torch.zeros(3, device=batch.mask.device)
    for rows in minibatches:
        denominator = weights[rows].sum()
        for mine in my_micro_batches(batch, rows, cfg):
            logps, weight = token_values(policy.model, batch, mine, cfg.temperature), weights[mine]
            old = logps.detach() if old_logps is None else old_logps[mine]
            drift = ((old - logps.detach()) * weight).sum() / denominator
            if cfg.importance_cap:
                weight = weight * torch.exp(old - batch.engine_logps[mine]).clamp(max=cfg.importance_cap)
            loss, clip_fraction = ppo_loss(logps, old, advantages[mine], weight, cfg.clip, denominator)
            sums += torch.stack([backward(loss), clip_fraction, drift])
            passes.append((mine, logps))
        norms.append(policy.update())
    old_logps = assemble(passes, batch) if old_logps is None else old_logps
    gap = ((old_logps - batch.engine_logps) * batch.mask).abs()  # engine and trainer compute the same policy
    loss, clip_fraction, drift = (total(sums) / len(minibatches)).tolist()
    return {"policy/loss": loss, "policy/clip_fraction": clip_fraction, "policy/kl_old": drift,
            "policy/grad_norm": sum(norms) / len(norms), "policy/entropy": float(-old_logps.sum() / batch.mask.sum()),
            "rollout/engine_gap": float(gap.sum() / batch.mask.sum()), "rollout/engine_gap_max": float(gap.max())}

def update_critic(critic: Optional[Learner], batch: Batch, targets: Optional[Tensor], cfg: Config) -> dict:
    """PPO's critic: half the squared error of V(y_<t) against targets (B, T), in minibatches of the policy's size."""
    losses = []
    for rows in batch.blocks(cfg.minibatch) if critic else []:
        loss, denominator = torch.zeros((), device=batch.mask.device), batch.mask[rows].sum()
        for mine in my_micro_batches(batch, rows, cfg):
            errors = (token_values(critic.model, batch, mine) - targets[mine]) * batch.mask[mine]
            loss += backward(0.5 * (errors ** 2).sum() / denominator)
        losses.append(float(total(loss)))
        critic.update()
    return {"critic/loss": sum(losses) / len(losses)} if critic else {}

# ----------------------------------------------------------------------------------------------------------------------
# Around the algorithm: SFT warm-up (App. D), evaluation, the run folder and its checkpoints.

def sft_example(row: dict, tokenizer, cfg: Config, where: str) -> Rollout:
    """A worked response, its end of turn included, from Eurus-2-SFT-Data's schema or columns prompt and response."""
    if row.get("conversations"):
        prompt, response = (message.get("value") for message in row["conversations"][:2])
        prompt = [{"role": "system", "content": row["system"]}, {"role": "user", "content": prompt}] if row.get("system") else prompt
    else:
        prompt, response = row.get("prompt"), row.get("response")
    if not prompt or not isinstance(response, str):
        raise UserError(f"{where}: an SFT row holds prompt and response, or conversations")
    prompt_ids = encode_prompt(prompt, tokenizer, cfg)
    if cfg.template == "chat":  # what the template puts behind the opening of the assistant's turn
        opening = tokenizer.apply_chat_template(as_chat(prompt, cfg), add_generation_prompt=True, tokenize=False)
        turn = as_chat(prompt, cfg) + [{"role": "assistant", "content": response}]
        response = tokenizer.apply_chat_template(turn, tokenize=False)[len(opening):].rstrip()
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return Rollout(0, prompt_ids, ids if cfg.template == "chat" else ids + [tokenizer.eos_token_id], [0.0])

def sft_batches(rows, tokenizer, cfg: Config) -> Iterator[tuple[Batch, int]]:
    """Shuffled batches of exactly --sft-batch examples, and how many were dropped as too long so far."""
    dropped = 0
    for epoch in range(cfg.sft_epochs):
        examples = []
        for i in random.Random(f"{cfg.seed} sft {epoch}").sample(range(len(rows)), len(rows)):
            example = sft_example(rows[i], tokenizer, cfg, f"--sft-data {cfg.sft_data}, line {i + 1}")
            if len(example.prompt_ids) + len(example.ids) > cfg.sft_max_tokens:
                dropped += 1
                continue
            examples.append(example)
            if len(examples) == cfg.sft_batch:
                yield Batch.of(examples), dropped
                examples = []

def train_sft(name: str, tokenizer, cfg: Config, run: "Run") -> None:
    """Maximise the likelihood of worked responses, the loss on responses only; leaves the folder RUN/sft."""
    rows = miniature_sft_rows(cfg.seed) if cfg.sft_data == "miniature" else load_rows(cfg.sft_data, "--sft-data")
    updates = cfg.sft_epochs * (len(rows) // cfg.sft_batch)
    if not updates:
        raise UserError(f"--sft-data {cfg.sft_data} holds {len(rows)} rows, fewer than --sft-batch {cfg.sft_batch}")
    learner = Learner(load_model(name, cfg), cfg.sft_lr, 0.0, 1.0)
    with run.bar(updates, "SFT") as bar:
        for step, (batch, dropped) in enumerate(sft_batches(rows, tokenizer, cfg), 1):
            schedule = min(step / (0.1 * updates), 0.5 + 0.5 * math.cos(math.pi * (step - 1) / updates))
            learner.optimizer.param_groups[0]["lr"] = cfg.sft_lr * schedule
            loss = torch.zeros((), device=batch.mask.device)
            for mine in my_micro_batches(batch, range(cfg.sft_batch), cfg):
                loss += backward(-token_values(learner.model, batch, mine).sum() / batch.mask.sum())
            norm = learner.update()
            bar.update()
            if step % 10 == 0:
                loss = float(total(loss))
                bar.set_postfix(loss=f"{loss:.3f}")
                run.log({"sft/step": step, "sft/loss": loss, "sft/grad_norm": norm, "sft/too_long": dropped})
    save_pretrained(learner.model, tokenizer, run.folder / "sft")

def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of P(one of k samples is right) from `right` of n: 1 - C(n-right, k) / C(n, k)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)

def majority_vote(group: list[Rollout]) -> float:
    """Outcome of the answer that most responses of a group give; equal answers count together, the first of equals wins."""
    votes = []
    for rollout in group:
        answer = verify.extract_answer(rollout.text)
        same = next((v for v in votes if answer == v[0] or verify.math_equal(answer, v[0])), None) if answer else [0, 0, 0]
        if same is None:
            votes.append([answer, rollout.outcome, 0])
        (same or votes[-1])[2] += 1
    return max(votes, key=lambda v: v[2])[1] if votes else 0.0

def evaluate(sampler: Sampler, sets: list[Problems], cfg: Config, run: "Run", step: int, models: Optional[Models]) -> dict:
    """Greedy pass@1 and, with --eval-samples N, avg@N, pass@k, majority vote and best-of-N, each with its standard error.

    Best-of-N is by R_phi, with --eval-only or --inspect. Every response and its score go to RUN/eval.
    """
    metrics, n = {}, cfg.eval_samples
    for problems in sets:
        encoded = [(i, encode_prompt(problems[i].prompt, sampler.tokenizer, cfg)) for i in range(len(problems))]
        prompts = [(i, ids) for i, ids in encoded if len(ids) <= cfg.max_prompt_tokens]
        if not prompts:
            raise UserError(f"--max-prompt-tokens {cfg.max_prompt_tokens}: all prompts of {problems.name} are longer")
        with sampler.awake(), run.bar(len(prompts) * (1 + n), f"evaluate {problems.name}") as bar:
            greedy = sampler.sample(problems, prompts, 1, 0.0, "greedy", bar)
            groups = sampler.sample(problems, prompts, n, cfg.eval_temperature, "eval", bar) if n else [[] for _ in prompts]
        figures = {"greedy": [group[0].outcome for group in greedy]}
        if n:
            figures[f"avg@{n}"] = [sum(r.outcome for r in group) / n for group in groups]
            for k in [2 ** j for j in range(1, n.bit_length())]:
                figures[f"pass@{k}"] = [pass_at_k(n, sum(r.outcome >= 1 for r in group), k) for group in groups]
            if problems[prompts[0][0]].task == "math":
                figures[f"majority@{n}"] = [majority_vote(group) for group in groups]
        if n and models and models.prm and models.ref and (cfg.eval_only or cfg.inspect):
            batch = Batch.of([r for group in groups for r in group])
            rewards = implicit_rewards(score(models.prm.model, batch, cfg), score(models.ref, batch, cfg), batch.mask, cfg.beta)
            best = rewards.sum(-1).view(-1, n).argmax(-1).tolist()
            figures[f"best_of@{n}"] = [group[b].outcome for group, b in zip(groups, best)]
        metrics |= {f"eval/{problems.name}/problems": len(prompts), f"eval/{problems.name}/too_long": len(encoded) - len(prompts)}
        for key, values in figures.items():
            mean = sum(values) / len(values)
            error = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values))
            metrics |= {f"eval/{problems.name}/{key}": mean, f"eval/{problems.name}/{key}_se": error}
        run.write(f"eval/step-{step}-{Path(problems.name).stem}.jsonl", "".join(json.dumps(
            {"index": i, "prompt": problems[i].prompt, "reference": problems[i].reference} | {
                key: [{"text": r.text, "score": r.outcome} for r in group] for key, group in (("greedy", g), ("samples", s))}
        ) + "\n" for (i, _), g, s in zip(prompts, greedy, groups)))
    return metrics

class Run:
    """The run folder: config.json, metrics.jsonl, checkpoints, evaluations, models. Rank 0 alone writes."""

    def __init__(self, cfg: Config):
        self.folder, self.main = Path(gather(cfg.output)[0]), dist.get_rank() == 0
        self.metrics, self.seconds, self.interrupted = self.folder / "metrics.jsonl", Counter(), False
        if self.main and not cfg.resume:
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise UserError(f"--output {self.folder} is taken: choose another, or --resume it")
            self.write("config.json", json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
        if self.main:
            self.metrics.touch()
        dist.barrier()

    def write(self, name: str, text: str) -> None:
        """Write a file of the run folder, complete or not at all."""
        if self.main:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            tmp = path.with_name(path.name + ".tmp")
            tmp.write_text(text, encoding="utf-8")
            tmp.replace(path)

    def log(self, metrics: dict) -> None:
        """Append a line to metrics.jsonl."""
        if self.main:
            with open(self.metrics, "a", encoding="utf-8") as f:
                f.write(json.dumps(metrics) + "\n")

    def rewind(self, size: int) -> None:
        """Move what metrics.jsonl holds beyond size bytes to a backup: those steps run anew."""
        if self.main and self.metrics.exists() and self.metrics.stat().st_size > size:
            number = len(list(self.folder.glob("metrics.jsonl.bak*"))) + 1
            self.metrics.with_name(f"metrics.jsonl.bak{number}").write_bytes(self.metrics.read_bytes()[size:])
            os.truncate(self.metrics, size)

    def bar(self, length: int, text: str, initial: int = 0) -> tqdm:
        """A progress bar, on rank 0."""
        return tqdm(total=length, desc=text, initial=initial, disable=not self.main, dynamic_ncols=True)

    @contextlib.contextmanager
    def timed(self, phase: str):
        """Count the seconds of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def catch_interrupt(self) -> None:
        """The first Ctrl-C lets the step finish and save; a second one quits at once."""
        def handler(*_):
            if self.interrupted:
                os._exit(130)
            self.interrupted = True
            tqdm.write("interrupted: finishing this step, then saving; once more quits at once", file=sys.stderr)

        signal.signal(signal.SIGINT, handler)

    def end_step(self, step: int, metrics: dict, bar: tqdm) -> None:
        """Log a step and print its line."""
        metrics |= {f"time/{phase}": seconds for phase, seconds in self.seconds.items()} | {"time/step": sum(self.seconds.values())}
        self.seconds.clear()
        self.log({"step": step} | metrics)
        bar.update()
        parts = [f"{label} {metrics[key]:{form}}" for label, key, form in STEP_LINE if key in metrics]
        tqdm.write(f"step {step}: " + ", ".join(parts)) if self.main else None

    def summary(self) -> None:
        """Print the first and the last evaluation side by side, and where the results lie."""
        if not self.main:
            return
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines() if '"eval/' in line]
        for before, after in [(lines[0], lines[-1])] if lines else []:
            print(f"\n{'held-out accuracy':32}{'problems':>9}{'step %d' % before['step']:>17}{'step %d' % after['step']:>17}")
            for key in [key[:-3] for key in after if key.endswith("_se")]:
                cells = "".join(f"{m.get(key, math.nan):9.3f} ± {m.get(key + '_se', math.nan):.3f}" for m in (before, after))
                print(f"{key[5:]:32}{after[key.rsplit('/', 1)[0] + '/problems']:9}{cells}")
        print(f"results: {self.folder}")

STEP_LINE = (("accuracy", "rollout/accuracy", ".3f"), ("kept", "rollout/kept_prompts", "d"),
             ("of", "rollout/considered_prompts", "d"), ("length", "rollout/length", ".0f"), ("PRM loss", "prm/loss", ".3f"),
             ("AUC", "prm/auc", ".3f"), ("pairs", "prm/pair_accuracy", ".3f"), ("policy loss", "policy/loss", ".4f"),
             ("clipped", "policy/clip_fraction", ".3f"), ("norm", "policy/grad_norm", ".2f"), ("seconds", "time/step", ".2f"),
             ("rollout", "time/rollout", ".2f"), ("ref", "time/ref", ".2f"), ("PRM", "time/prm", ".2f"),
             ("critic", "time/critic", ".2f"), ("policy", "time/policy", ".2f"))

def checkpoint_state(models: Models) -> dict:
    """The sharded weights and optimizer states of all learners."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    return {name: dict(zip(("model", "optimizer"), get_state_dict(x.model, x.optimizer))) for name, x in models.learners.items()}

def save_checkpoint(run: Run, step: int, models: Models, queue: PromptQueue) -> None:
    """Write RUN/checkpoints/step-N: under another name, synced, renamed; only then the older one goes.

    All randomness is drawn from seeds named by step and purpose, so the step number is the random state.
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
        state = {"step": step, "metrics_bytes": run.metrics.stat().st_size, "queue": queue.state}
        (tmp / "state.json").write_text(json.dumps(state))
        for path in (run.metrics, *tmp.iterdir(), tmp):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        for old in set(folder.iterdir()) - {final}:
            shutil.rmtree(old)
    dist.barrier()

def load_checkpoint(run: Run, models: Models, queue: PromptQueue, cfg: Config) -> int:
    """Load the newest complete checkpoint, on any number of processes, and rewind the metrics; returns its step.

    Where there is none, the run starts at step 0, which is saved if SFT came before it.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict
    complete = [path for path in run.folder.glob("checkpoints/step-*") if path.name[5:].isdigit()]
    if not complete and cfg.sft_data:
        save_checkpoint(run, 0, models, queue)
    elif not complete:
        run.rewind(0)
    if not complete:
        return 0
    path = max(complete, key=lambda path: int(path.name[5:]))
    state, tensors = json.loads((path / "state.json").read_text()), checkpoint_state(models)
    dcp.load(tensors, checkpoint_id=path)
    for name, x in models.learners.items():
        set_state_dict(x.model, x.optimizer, model_state_dict=tensors[name]["model"], optim_state_dict=tensors[name]["optimizer"])
    run.rewind(state["metrics_bytes"])
    queue.load(state["queue"])
    return state["step"]

def throughput(run: Run, batch: Batch, models: Models, flops: float) -> dict:
    """Tokens a second, and the utilisation of a device that multiplies matrices at `flops` operations a second: a forward
    and backward pass is 6 operations a parameter and token; attention is not counted."""
    tokens, metrics = sum(map(len, batch.tokens)), {}
    parameters = sum(p.numel() for p in models.policy.model.parameters())
    for phase in models.learners:
        if run.seconds[phase]:
            metrics[f"tokens_per_second/{phase}"] = tokens / run.seconds[phase]
            metrics[f"mfu/{phase}"] = 6 * parameters * tokens / run.seconds[phase] / (flops * dist.get_world_size())
    return metrics | {"tokens_per_second/rollout": float(batch.mask.sum()) / run.seconds["rollout"]}

def matmul_flops(cfg: Config) -> float:
    """Operations a second of a large matrix product on this device, in --dtype."""
    n, best = 8192 if torch.cuda.is_available() else 768, math.inf
    a = torch.ones(n, n, device=device(), dtype=getattr(torch, cfg.dtype))
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best

# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 1.

def starting_model(cfg: Config, run: Run) -> tuple[str, object]:
    """The SFT model (a name or folder) that policy, PRM and reference start from, trained here if asked; its tokenizer."""
    from transformers import AutoTokenizer
    name = cfg.model or str(run.folder / "init")
    if not cfg.model and run.main:
        make_miniature_model(Path(name), cfg.seed)
    dist.barrier()
    tokenizer = from_pretrained(AutoTokenizer, name, "--model")
    if cfg.prm and from_pretrained(AutoTokenizer, cfg.prm, "--prm").get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--prm {cfg.prm} has another vocabulary than --model, whose tokens it is to judge")
    if cfg.sft_data and not (run.folder / "sft").exists():
        run.rewind(0)
        train_sft(name, tokenizer, cfg, run)
    return str(run.folder / "sft") if cfg.sft_data else name, tokenizer

def first_logps(models: Models, batch: Batch, cfg: Config) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """old_logps and ref_logps, both (B, T); None where nothing needs them before the policy's own forward pass."""
    if models.prm and not models.ref:  # --prm-ref policy: one forward pass serves both
        logps = score(models.policy.model, batch, cfg, cfg.prm_minibatch)
        return logps, logps
    several = cfg.ppo_epochs * len(batch.tokens) > cfg.minibatch
    old_logps = score(models.policy.model, batch, cfg, cfg.minibatch, cfg.temperature) if several else None
    return old_logps, score(models.ref, batch, cfg, cfg.prm_minibatch) if models.prm else None

def probe_prm(models: Models, considered: list[Rollout], cfg: Config, step: int) -> dict:
    """--prm-probe-every: the PRM's quality on all rollouts, before the filter and before its update."""
    if not models.prm or not cfg.prm_probe_every or step % cfg.prm_probe_every:
        return {}
    batch = Batch.of(considered)
    ref_logps = score(models.ref or models.policy.model, batch, cfg)
    sums = implicit_rewards(score(models.prm.model, batch, cfg), ref_logps, batch.mask, cfg.beta).sum(-1)
    return {f"prm/all_{key}": value for key, value in prm_metrics(sums, batch.outcomes, cfg.group_size).items()}

def train(cfg: Config, run: Run) -> int:
    """Algorithm 1, from an SFT model that --sft-data makes first. Returns the exit code."""
    name, tokenizer = starting_model(cfg, run)
    if not cfg.steps:
        return 0
    queue = PromptQueue(Problems(cfg.data, cfg), tokenizer, cfg)
    eval_sets = [Problems(name, cfg, "test", "--eval-data") for name in cfg.eval_data or []]
    models, flops = load_models(name, cfg), matmul_flops(cfg)
    first = load_checkpoint(run, models, queue, cfg)
    run.catch_interrupt()
    with Sampler.open(name, tokenizer, cfg, models.policy.model) as sampler, run.bar(cfg.steps, "PRIME", first) as bar:
        if first == 0:
            run.log({"step": 0} | evaluate(sampler, eval_sets, cfg, run, 0, models))
        for step in range(first + 1, cfg.steps + 1):
            with run.timed("rollout"):  # sample K responses a prompt, verify, filter
                kept, considered, metrics = collect_rollouts(sampler, queue, cfg, step)
                batch = Batch.of(kept)
            with run.timed("ref"):
                metrics |= probe_prm(models, considered, cfg, step)
                old_logps, ref_logps = first_logps(models, batch, cfg)
            with run.timed("prm"):  # implicit process rewards (Eq. 3); update the PRM on the outcomes
                process_rewards, figures = score_and_update_prm(models.prm, ref_logps, batch, cfg)
                metrics |= figures
            with run.timed("critic"):  # nothing, but with --estimator ppo
                values = score(models.critic.model, batch, cfg) if models.critic else None
                advantages, targets = estimate_advantages(process_rewards, batch, cfg, values)  # Eq. 5
                metrics |= update_critic(models.critic, batch, targets, cfg)
            with run.timed("policy"):  # PPO's clipped update (Eq. 6)
                if step > cfg.prm_warmup_steps:
                    metrics |= update_policy(models.policy, batch, advantages, old_logps, cfg, step)
            metrics |= throughput(run, batch, models, flops)
            stop = any(gather(run.interrupted))
            if step == cfg.steps or cfg.eval_every and step % cfg.eval_every == 0 and not stop:
                metrics |= evaluate(sampler, eval_sets, cfg, run, step, models)
            run.end_step(step, metrics, bar)
            if stop or step == cfg.steps or cfg.save_every and step % cfg.save_every == 0:
                save_checkpoint(run, step, models, queue)
            if stop and step < cfg.steps:
                return 130
        save_pretrained(models.policy.model, tokenizer, run.folder / "policy")
        if models.prm:
            save_pretrained(models.prm.model, tokenizer, run.folder / "prm", reference=str(Path(name).absolute()), beta=cfg.beta)
        run.summary()
    return 0

def evaluate_only(cfg: Config, run: Run) -> int:
    """--eval-only: --model on --eval-data, best-of-N by --prm. Returns the exit code."""
    from transformers import AutoTokenizer
    tokenizer, models = from_pretrained(AutoTokenizer, cfg.model, "--model"), None
    sets = [Problems(name, cfg, "test", "--eval-data") for name in cfg.eval_data]
    if cfg.prm:
        notes = Path(cfg.prm) / "implicit_prm.json"
        if cfg.prm_ref == "sft" and not notes.exists():
            raise UserError("--prm-ref is missing: name the model that the PRM was trained against")
        reference = json.loads(notes.read_text())["reference"] if cfg.prm_ref == "sft" else cfg.prm_ref
        prm = load_model(cfg.prm, cfg, "--prm", frozen=True)
        models = Models(None, Learner(prm, 0.0, 0.0, 0.0), load_model(reference, cfg, "--prm-ref", frozen=True))
    with Sampler.open(cfg.model, tokenizer, cfg) as sampler:
        run.log({"step": 0} | evaluate(sampler, sets, cfg, run, 0, models))
        run.summary()
    return 0

# ----------------------------------------------------------------------------------------------------------------------
# The command line.

def parse_args(argv: list[str]) -> Config:
    """Options given by hand win over the miniature's overrides, these over the paper's defaults; or --resume's config."""
    from transformers import HfArgumentParser
    unset, about = object(), __doc__.split("\n\n")[0]
    parser = HfArgumentParser(SECTIONS, usage="python prime.py [options]", description=about, allow_abbrev=False)

    def error(message):
        raise UserError(message)

    parser.error = error
    names = [f.name for f in dataclasses.fields(Config)]
    namespace = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    given = {name: value for name, value in vars(namespace).items() if value is not unset}
    if "resume" in given:
        return resumed_config(given)
    overrides = {}
    if given.get("data", "miniature") == "miniature" and ("data" in given or not {"sft_data", "eval_only"} & set(given)):
        overrides = MINIATURE | ({} if "model" in given else MINIATURE_SFT)
    cfg = Config(**overrides | given)
    cfg.output = cfg.output or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return cfg

def resumed_config(given: dict) -> Config:
    """The config of the run to go on with; only the number of steps may differ."""
    try:
        saved = json.loads((Path(given["resume"]) / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"--resume {given['resume']}: no config.json there, so no run to go on with") from None
    for name in set(given) - {"resume", "steps"}:
        if given[name] != saved[name]:
            raise UserError(f"{flag(name)} {given[name]} conflicts with the run's {saved[name]}: --resume changes --steps at most")
    return Config(**saved | given | {"output": given["resume"]})

def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        cfg = parse_args(sys.argv[1:] if argv is None else argv)
        check_config(cfg, world)
        setup_distributed()
        run = Run(cfg)
        return evaluate_only(cfg, run) if cfg.eval_only else train(cfg, run)
    except UserError as e:
        message = str(e)
    except torch.OutOfMemoryError as e:
        message = ("out of GPU memory; what helps: a smaller --token-budget, --activation-checkpointing, --prm-ref policy, "
                   f"--cpu-offload, a smaller --vllm-memory, more GPUs ({str(e).split('. ')[0]})")
    except KeyboardInterrupt:
        return 130
    time.sleep(5 * (rank > 0))  # rank 0 speaks for all; the others only where it has nothing to say
    print(f"prime.py: error: {message}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
