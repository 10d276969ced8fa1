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

Shapes: B = P * K responses, the K responses of a prompt next to each other; T response positions; mask (B, T) is 1 on
response tokens, the end-of-sequence token included. The mathematics are pure functions of tensors; devices, ranks and
engines appear in the sections on models and rollout only.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import itertools
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
from statistics import fmean, stdev
from typing import Iterable, Iterator, Literal

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
class DataOptions:
    _argument_group_name = "models and data"
    model: str | None = opt(None, "SFT model that all three start from: hub id or folder (paper: Eurus-2-7B-SFT)")
    data: str | None = opt(None, "RL prompts: hub id, .parquet, .jsonl or 'miniature' (paper: Eurus-2-RL-Data)")
    eval_data: list[str] | None = opt(None, "held-out sets, named like --data")
    template: Literal["chat", "zero", "none"] = opt("chat", "chat template; 'zero': a plain one (Sec. 5); 'none': bare text")
    system_prompt: str | None = opt(None, "system message for plain rows (chat rows hold their own)")
    prompt_suffix: str | None = opt(None, "added to plain rows (default: ask for \\boxed{} or a python block)")
    max_prompt_tokens: int = opt(1024, "longer prompts are dropped and counted (official)")
    max_response_tokens: int = opt(3072, "responses are cut here (official)")
    dtype: Literal["bfloat16", "float32"] = opt("bfloat16", "of the computation; weights and Adam stay float32 (official)")
    token_budget: int = opt(4096, "tokens of one micro-batch on one rank; a longer response goes alone")
    activation_checkpointing: bool = opt(False, "recompute activations: less memory, about a third slower")
    cpu_offload: bool = opt(False, "keep parameters, gradients and Adam states in host memory (official: on)")

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
    max_draws: int = opt(20, "give up when a step has drawn this many times --prompts-per-step")
    rollout_batch: int = opt(256, "hf engine: sequences decoded at once")
    vllm_memory: float = opt(0.6, "vLLM engine: share of the GPU's memory (official: 0.7)")
    importance_cap: float = opt(0.0, "C > 0 weighs tokens by min(pi_trainer / pi_vllm, C); 0: off, as published")
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
    last_token: bool = opt(True, "the last token has a process reward as well (official; its later port: 0)")
    prm_role: Literal["reward", "value"] = opt("reward", "value: A_t = r_o - v_phi(y_<t) (Sec. 5)")
    normalize: bool = opt(True, "divide process rewards by the batch's largest |reward-to-go| (official)")
    whiten: bool = opt(True, "whiten advantages over the batch's tokens (official)")

@dataclass
class PRMOptions:
    _argument_group_name = "implicit PRM (Sec. 3, 5)"
    prm: str | None = opt(None, "other initialisation of the PRM (Sec. 5); with --eval-only the PRM of best-of-N")
    prm_ref: str = opt("sft", "of Eq. 3: sft, frozen, or policy, its old log-probabilities; with --eval-only a folder")
    prm_lr: float = opt(1e-6, "constant learning rate, also of PPO's critic (Sec. 4)")
    prm_grad_clip: float = opt(10.0, "largest gradient norm (official; norms near 20 are normal at first)")
    prm_minibatch: int = opt(256, "responses an update, whole groups (Sec. 4: 4 updates a step)")
    prm_update: Literal["single", "score-first", "double", "none"] = opt(
        "single", "a response is scored by its own training forward, the PRM before any update, or after all; none: frozen")
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

@dataclass
class RunOptions:
    _argument_group_name = "run, SFT warm-up (App. D) and evaluation"
    output: str | None = opt(None, "run folder (default: runs/DATE-TIME)")
    resume: str | None = opt(None, "run folder to go on with")
    steps: int = opt(592, "rollout steps (Table 1); 0: stop after SFT")
    seed: int = opt(42, "of prompts, sampling and shuffling")
    save_every: int = opt(16, "steps between checkpoints, 0: only the last (official)")
    report_to: Literal["none", "tensorboard", "wandb"] = opt("none", "besides metrics.jsonl")
    sft_data: str | None = opt(None, "train --model on this first: Eurus-2-SFT-Data's schema, or prompt and response")
    sft_epochs: int = opt(3, "passes over it (App. D)")
    sft_batch: int = opt(96, "examples an update (App. D)")
    sft_lr: float = opt(1e-5, "peak learning rate: 10%% warm-up, then cosine (App. D)")
    eval_every: int = opt(16, "steps between evaluations, 0: only first and last (official)")
    eval_only: bool = opt(False, "evaluate --model on --eval-data, train nothing")
    eval_samples: int = opt(0, "besides greedy, N samples a problem: avg@N, pass@k, majority (Table 12: 16)")
    eval_temperature: float = opt(0.3, "of those samples (Table 12)")
    inspect: bool = opt(False, "with --eval-only and --prm: write a page that shades tokens by process reward")

SECTIONS = (DataOptions, RolloutOptions, RewardOptions, PRMOptions, PolicyOptions, RunOptions)

@dataclass
class Config(*SECTIONS):
    """All options, flat."""

# The built-in experiment: what differs from the paper's values where --data is absent or 'miniature' ...
MINIATURE = dict(
    data="miniature", eval_data=["miniature-test"], template="none", max_prompt_tokens=16, max_response_tokens=48,
    dtype="float32", token_budget=16384, rollout="hf", rollout_batch=512, prompts_per_step=32, minibatch=128,
    prm_minibatch=128, lr=1e-4, prm_lr=2e-4, steps=60, save_every=20, eval_every=0, eval_samples=4, eval_temperature=1.0,
    prm_probe_every=1)
# ... and without --model, whose SFT model is then made first, from nothing.
MINIATURE_SFT = dict(sft_data="miniature", sft_epochs=1, sft_batch=48, sft_lr=3e-3)

class UserError(Exception):
    """A user's mistake: one line that names the option and what would be right; exit code 2."""

@contextlib.contextmanager
def blaming(what: str, remedy: str = ""):
    """Make whatever a library raises (the hub client has dozens of kinds) one line: what failed, why, and what would help."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        cause = " ".join(str(e).split())[:300] or type(e).__name__
        raise UserError(f"{what} ({cause}){remedy}") from None

def flag(name: str) -> str:
    """The option that changes a Config field."""
    return ("--no-" if getattr(Config, name) is True else "--") + name.replace("_", "-")

def check_config(cfg: Config, world: int) -> None:
    """Raise UserError for values that cannot work, alone or together, on this many processes."""
    def need(right, message):
        if not right:
            raise UserError(message)

    def idle(here, why, *names):
        """Refuse options that would do nothing here."""
        for name in names:
            need(not here or getattr(cfg, name) == getattr(Config, name), f"{why}: drop {flag(name)}")

    for name, value in dataclasses.asdict(cfg).items():
        need(not isinstance(value, (int, float)) or 0 <= value < math.inf, f"{flag(name)} must not be negative or infinite")
    for name in ("prompts_per_step", "group_size", "minibatch", "prm_minibatch", "token_budget", "max_response_tokens",
                 "max_prompt_tokens", "ppo_epochs", "rollout_batch", "sft_batch", "sft_epochs", "max_draws"):
        need(getattr(cfg, name) >= 1, f"{flag(name)} must be at least 1, not {getattr(cfg, name)}")
    for name in ("gamma", "vllm_memory", "filter_low", "filter_high"):
        need(getattr(cfg, name) <= 1, f"{flag(name)} must be at most 1, not {getattr(cfg, name)}")
    need(cfg.data or cfg.eval_only or not cfg.steps, "--data is missing: name the RL prompts (or --steps 0: SFT alone)")
    need(cfg.steps or cfg.sft_data or cfg.eval_only, "--steps 0 without --sft-data leaves nothing to do")
    need(cfg.model or cfg.sft_data == cfg.data == "miniature", "--model is missing: name the SFT model to start from")
    need(not cfg.sft_data or cfg.sft_batch % world == 0, f"--sft-batch {cfg.sft_batch} is not a multiple of {world} processes")
    need(uses_vllm(cfg) or not cfg.importance_cap, "--importance-cap corrects for vLLM's rounding: it needs --rollout vllm")
    need(cfg.verify_timeout > 0, "--verify-timeout must be positive")
    titles = [Path(name).stem for name in cfg.eval_data or []]
    need(len(titles) == len(set(titles)), "--eval-data holds two sets of one name: rename one")
    need(titles or not cfg.eval_only, "--eval-only needs --eval-data: name one or several sets")
    need(not cfg.inspect or cfg.eval_only and cfg.prm, "--inspect needs --eval-only and --prm (training writes its page anyway)")
    if cfg.eval_only:
        need(not cfg.prm or cfg.prm_ref not in ("sft", "policy"), "--prm-ref is missing: name the SFT model that --prm came from")
        return
    need(cfg.group_size > 1 or cfg.estimator not in ("rloo", "grpo") and cfg.prm_loss == "ce",
         f"--group-size 1 leaves nothing to compare with: --estimator {cfg.estimator}, --prm-loss {cfg.prm_loss} need 2")
    need(cfg.temperature > 0, "--temperature 0 samples the same response K times: give a positive one")
    need(cfg.filter_low <= cfg.filter_high, "--filter-low must not exceed --filter-high")
    idle(not cfg.filter, "--no-filter has no bounds", "filter_low", "filter_high")
    need(cfg.beta > 0, "--beta 0 makes every process reward 0: give a positive one")
    need(cfg.process_weight * (cfg.reward != "outcome") + cfg.outcome_weight * (cfg.reward != "process") > 0,
         "--process-weight and --outcome-weight leave every advantage 0: give one of them a positive weight")
    batch = cfg.prompts_per_step * cfg.group_size
    sizes = {"--minibatch": cfg.minibatch} | ({} if cfg.reward == "outcome" else {"--prm-minibatch": cfg.prm_minibatch})
    for name, size in sizes.items():
        need(batch % size == 0, f"{name} {size} does not divide the {batch} responses of --prompts-per-step times --group-size")
        need(size % world == 0, f"{name} {size} is not a multiple of the {world} processes")
    need(cfg.reward == "outcome" or cfg.prm_minibatch % cfg.group_size == 0,
         f"--prm-minibatch {cfg.prm_minibatch} splits groups of {cfg.group_size}")
    need(cfg.prm_ref in ("sft", "policy"), "--prm-ref is 'sft' or 'policy' (a folder with --eval-only)")
    idle(cfg.reward == "process", "--reward process has no outcome part", "outcome_weight")
    need(cfg.prm_ref == "sft" or cfg.temperature == 1, "--prm-ref policy needs --temperature 1")
    need(cfg.process_baseline == "token-mean" or cfg.estimator == "rloo", "--process-baseline belongs to --estimator rloo")
    need(cfg.granularity == "token" or cfg.gamma == 1 and cfg.process_baseline == "token-mean",
         "--granularity whole knows no --gamma and no --process-baseline")
    need(cfg.prm_update != "none" or cfg.prm_loss == "ce" and not cfg.prm_warmup_steps and (cfg.prm or cfg.reward == "outcome"),
         "--prm-update none needs a trained --prm, and no --prm-loss or --prm-warmup-steps")
    idle(cfg.prm_role == "value", "--prm-role value replaces the estimator", "reward", "estimator", "process_baseline",
         "granularity", "gamma", "process_weight", "outcome_weight", "normalize", "last_token")
    idle(cfg.reward == "outcome", "--reward outcome has no process reward", "prm", "prm_ref", "prm_update", "prm_loss",
         "prm_warmup_steps", "granularity", "prm_role", "gamma", "prm_grad_clip", "beta", "process_weight",
         "process_baseline", "last_token", "normalize")

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

def problem_from_row(row: dict, where: str, suffix: str | None = None) -> Problem:
    """Understand a row in Eurus-2-RL-Data's schema, plain columns, or those of the usual benchmarks; where names it in
    the UserError raised if it has no prompt or no answer. suffix is added to plain prompts (None: the task's own)."""
    def first(*names):
        return next((row[n] for n in names if row.get(n) not in (None, "", [])), None)

    row = {key.lower(): value for key, value in row.items()}
    prompt, task, reference = first("problem", "question", "prompt", "question_content"), "code", None
    if isinstance(row.get("reward_model"), dict):  # Eurus-2-RL-Data
        task, reference = row.get("ability"), row["reward_model"].get("ground_truth")
    elif first("tests", "input_output"):
        reference = first("tests", "input_output")
    elif isinstance(row.get("test"), str):  # LeetCode: a script of assertions
        reference = {"asserts": row["test"], "fn_name": row.get("entry_point")}
    elif isinstance(row.get("public_test_cases"), str):  # LiveCodeBench
        with blaming(f"{where}: public_test_cases is no JSON list of input and output"):
            cases, metadata = json.loads(row["public_test_cases"]), json.loads(row.get("metadata") or "{}")
            reference = {"inputs": [c["input"] for c in cases], "outputs": [c["output"] for c in cases],
                         "fn_name": metadata.get("func_name")}
    else:
        task, reference = "math", first("answer", "expected_answer", "final_answer")
        if reference is None and isinstance(row.get("solution"), str):  # MATH, Minerva: in the worked solution
            reference = verify.extract_answer(row["solution"])
        if reference is not None:  # a list: OlympiadBench
            reference = ", ".join(map(str, reference)) if isinstance(reference, list) else str(reference)
    if not prompt:
        raise UserError(f"{where}: no prompt (a column problem, question or prompt)")
    if reference in (None, "") or task not in ("math", "code"):
        raise UserError(f"{where}: no answer (a column answer, tests or reward_model), or ability neither math nor code")
    if not isinstance(prompt, list):  # starter_code names the function that LiveCodeBench calls
        parts = [str(part) for part in (row.get("context"), prompt, row.get("starter_code")) if part]
        prompt = "\n\n".join(parts) + ({"math": MATH_SUFFIX, "code": CODE_SUFFIX}[task] if suffix is None else suffix)
    elif not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt):
        raise UserError(f"{where}: a chat prompt is a list of messages with role and content")
    return Problem(prompt, task, reference)

def load_rows(name: str, option: str, split: str = "train"):
    """The rows of a .jsonl or .parquet file or of a hub data set: a list of dicts, or an Arrow table of them."""
    with blaming(f"{option} {name}: cannot be loaded"):
        if name.endswith(".jsonl"):
            rows, text = [], Path(name).read_text(encoding="utf-8").rstrip()
            for number, line in enumerate(text.split("\n") if text else [], 1):
                with blaming(f"{option} {name}, line {number}: cannot be loaded"):
                    rows.append(dict(json.loads(line)))
            return rows
        import datasets
        if name.endswith(".parquet"):
            return datasets.Dataset.from_parquet(name)
        splits = datasets.load_dataset(name)
        return next(splits[name] for name in (split, "validation", *splits) if name in splits)

class Problems:
    """A sequence of Problem over one data set, each row converted when asked for."""

    def __init__(self, name: str, cfg: Config, split: str = "train", option: str = "--data"):
        builtin = name.startswith("miniature") and not Path(name).suffix
        self.name, self.title, self.suffix = name, Path(name).stem, "" if builtin else cfg.prompt_suffix
        self.rows = miniature_rows(name, option) if builtin else load_rows(name, option, split)
        if not len(self.rows):
            raise UserError(f"{option} {name} holds no rows")
        for i in range(len(self.rows) if isinstance(self.rows, list) else 1):
            self[i]  # name a bad line now, not in the middle of the night
        if self[0].task == "code" and cfg.sandbox != "limits" and verify.refusal():
            raise UserError(f"--sandbox {cfg.sandbox}: {verify.refusal()}")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i: int) -> Problem:
        return problem_from_row(self.rows[i], f"{self.name}, line {i + 1}", self.suffix)

def as_chat(prompt: list | str, cfg: Config) -> list[dict]:
    """A prompt as chat messages."""
    system = [{"role": "system", "content": cfg.system_prompt}] if cfg.system_prompt else []
    return prompt if isinstance(prompt, list) else system + [{"role": "user", "content": prompt}]

def encode_prompt(prompt: list | str, tokenizer, cfg: Config) -> list[int]:
    """Token ids of a prompt in the format of --template; the chat template is applied exactly once."""
    if cfg.template == "chat":
        if not tokenizer.chat_template:
            raise UserError("--template chat: the model's tokenizer has no chat template; give --template zero or none")
        with blaming("--template chat: the model's chat template refuses a prompt"):  # a system message for instance
            return tokenizer.apply_chat_template(as_chat(prompt, cfg), add_generation_prompt=True, return_dict=True)["input_ids"]
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    text = ZERO_TEMPLATE.format(text) if cfg.template == "zero" else text
    return tokenizer(text, add_special_tokens=cfg.template == "zero")["input_ids"]

@functools.lru_cache(2)
def shuffled(n: int, seed: str) -> list[int]:
    """The numbers below n in an order of their own for each seed."""
    return random.Random(seed).sample(range(n), n)

class PromptQueue:
    """Prompts in shuffled epochs, drawn in one global order; prompts put back come first. Its state is JSON."""

    def __init__(self, problems: Problems, tokenizer, cfg: Config):
        self.problems, self.tokenizer, self.cfg = problems, tokenizer, cfg
        self.state = {"position": 0, "head": [], "pass_rate": 1.0, "too_long": 0}

    def draw(self, n: int) -> list[tuple[int, list[int]]]:
        """The next n prompts that are short enough, as (problem index, token ids)."""
        drawn, state, skipped = [], self.state, 0
        while len(drawn) < n:
            if state["head"]:
                index = state["head"].pop(0)
            else:
                epoch, position = divmod(state["position"], len(self.problems))
                index = shuffled(len(self.problems), f"{self.cfg.seed} epoch {epoch}")[position]
                state["position"] += 1
            ids = encode_prompt(self.problems[index].prompt, self.tokenizer, self.cfg)
            if len(ids) <= self.cfg.max_prompt_tokens:
                drawn.append((index, ids))
                continue
            state["too_long"] += 1
            skipped += 1
            if not drawn and skipped >= len(self.problems):
                raise UserError(f"--max-prompt-tokens {self.cfg.max_prompt_tokens}: all {skipped} prompts are longer")
        return drawn

    def put_back(self, indices: list[int]) -> None:
        """Return prompts whose rollouts were not used to the head of the queue."""
        self.state["head"] = indices + self.state["head"]

# The miniature: chains of six operations mod 10, worked from left to right. `9-5*8+7+0+1-7=` is answered by
# `9-5=4,4*8=2,2+7=9,9+0=9,9+1=0,0-7=3,\boxed{3}`.

MINIATURE_SETS = {"miniature-test": slice(512), "miniature-val": slice(512, 1024), "miniature": slice(1024, 21024)}

def miniature_questions(seed: str, length: int = 6) -> Iterator[str]:
    """Chains without end."""
    rng = random.Random(seed)
    while True:
        yield str(rng.randrange(10)) + "".join(rng.choice("+-*") + str(rng.randrange(10)) for _ in range(length)) + "="

def miniature_solution(question: str, fact=lambda a, op, b, right: right) -> list[str]:
    """Each step `a+b=c` of a chain; fact may write another result than the right one."""
    value, steps = int(question[0]), []
    for op, b in re.findall(r"([-+*])(\d)", question):
        right = {"+": value + int(b), "-": value - int(b), "*": value * int(b)}[op] % 10
        result = fact(value, op, int(b), right)
        steps.append(f"{value}{op}{b}={result}")
        value = result
    return steps

def miniature_response(steps: list[str]) -> str:
    """The worked response that writes these steps."""
    return ",".join(steps) + f",\\boxed{{{steps[-1][-1]}}}"

def miniature_rows(name: str, option: str = "--data") -> list[dict]:
    """The problems of one of MINIATURE_SETS, which are disjoint."""
    if name not in MINIATURE_SETS:
        raise UserError(f"{option} {name}: the built-in sets are {', '.join(MINIATURE_SETS)}")
    distinct = list(dict.fromkeys(itertools.islice(miniature_questions("miniature"), 30000)))[::-1]
    return [{"prompt": q, "answer": miniature_solution(q)[-1][-1]} for q in distinct[MINIATURE_SETS[name]]]

def miniature_sft_rows(seed: int, n: int = 33600, length: int = 6, wrong: float = 0.2, belief: float = 0.6,
                       slip: float = 0.05) -> list[dict]:
    """Worked solutions of a fallible teacher, who writes a fixed share `wrong` of the 300 facts wrongly with probability
    `belief`, and slips elsewhere with probability `slip`."""
    rng, rows = random.Random(f"teacher {seed}"), []
    held_out = {row["prompt"] for name in ("miniature-val", "miniature-test") for row in miniature_rows(name)}
    facts = [(a, op, b) for a in range(10) for op in "+-*" for b in range(10)]
    misbelief = {f: rng.randrange(1, 10) for f in rng.sample(facts, int(wrong * len(facts)))}

    def fact(a, op, b, right):
        if (a, op, b) in misbelief and rng.random() < belief:
            return (right + misbelief[a, op, b]) % 10
        return rng.randrange(10) if rng.random() < slip else right

    for question in itertools.islice(miniature_questions(f"sft {seed}", length), n):
        response = miniature_response(miniature_solution(question, fact))
        if question not in held_out:
            rows.append({"prompt": question, "response": response})
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
            max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
            initializer_range=0.05,  # with the usual 0.02 some seeds have not learnt the facts when SFT ends
        )).save_pretrained(folder)

# ----------------------------------------------------------------------------------------------------------------------
# Models: load, shard with FSDP2, token log-probabilities. One process is a group of one: the same path everywhere.

LOGIT_CHUNK = 1024  # response tokens whose (tokens, vocabulary) float32 logits exist at one time

def setup_distributed() -> None:
    """Set this process up: its GPU or its allocator, and torchrun's process group or one of its own."""
    if "RANK" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")  # vLLM needs it, and some launchers do not set it
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        with contextlib.suppress(AttributeError):  # glibc: keep freed memory; fresh pages cost a fifth of an update
            ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own, which end when freed
            ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3), **alone)

def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

def padded(rows: Iterable, side: str = "right") -> Tensor:
    """Rows of unequal length as one tensor on this rank's device, filled up with zeros on that side."""
    tensors = [torch.as_tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side).to(device())

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
        Causal attention never looks at padding on the right, so no attention mask is needed or built."""
        hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][predicts]
        if self.value_head is not None:
            return self.value_head(hidden).sum(-1).float()
        weight, targets = self.lm.get_output_embeddings().weight, ids[:, 1:][predicts]
        *chunks, last = [(h, weight, t, temperature) for h, t in zip(hidden.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK))]
        logps = [checkpoint(chunk_logps, *chunk, use_reentrant=False) for chunk in chunks]  # logits made again in backward
        return torch.cat([*logps, chunk_logps(*last)])  # the last ones are needed first, so they stay

def chunk_logps(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(hidden weight^T / temperature) at the targets, float32: (n, d), (V, d), (n,) -> (n,)."""
    logits = F.linear(hidden, weight).float()
    logits = logits if temperature == 1 else logits / temperature
    return -F.cross_entropy(logits, targets, reduction="none")

def from_pretrained(loader, name: str, option: str, **kwargs):
    """loader.from_pretrained(name), with its many errors in one line."""
    with blaming(f"{option} {name}: cannot be loaded"):
        return loader.from_pretrained(name, **kwargs)

def load_tokenizer(name: str, cfg: Config):
    """The model's tokenizer, which must be the PRM's as well."""
    from transformers import AutoTokenizer
    tokenizer = from_pretrained(AutoTokenizer, name, "--model")
    if cfg.prm and from_pretrained(AutoTokenizer, cfg.prm, "--prm").get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--prm {cfg.prm} has another vocabulary than --model, whose tokens it is to judge")
    return tokenizer

def load_model(name: str, cfg: Config, option: str = "--model", frozen: bool = False, value_head: bool = False) -> TokenModel:
    """Shard a model over the ranks. Rank 0 reads it and deals its tensors out one by one; the others never hold it.
    Trained weights are float32 and computed with in --dtype; a frozen model is stored in --dtype: the same numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM
    compute, values = getattr(torch, cfg.dtype), {}
    config = from_pretrained(AutoConfig, name, option)
    if any(getattr(config, key, None) not in (None, 0, 1) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
        raise UserError(f"{option} {name}: models that scale their logits are not supported")
    for key in [key for key in config.to_dict() if key.endswith(("dropout", "pdrop"))]:
        setattr(config, key, 0.0)
    if dist.get_rank() == 0:
        source = TokenModel(from_pretrained(AutoModelForCausalLM, name, option, config=config, dtype=torch.float32))
        values = dict(source.named_parameters()) | dict(source.named_buffers())
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=compute if frozen else torch.float32)
        model = TokenModel(lm, value_head).train()  # checkpointing asks for training mode; there is no dropout
    if not hasattr(lm.base_model, "layers"):
        raise UserError(f"{option} {name}: only decoders built like Llama, Qwen or Mistral are supported")
    if cfg.activation_checkpointing and not frozen:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    plan = dict(mp_policy=MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
                offload_policy=CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cfg.cpu_offload else OffloadPolicy())
    for module in (*lm.base_model.layers, model):
        fully_shard(module, **plan)
    model.to_empty(device="cpu" if cfg.cpu_offload else device()).requires_grad_(not frozen)
    for key, p in model.named_parameters():
        full = torch.zeros(p.shape, dtype=p.dtype, device=device())
        if key in values:  # on rank 0; a critic's head starts from zero
            full.copy_(values[key].detach())
        p.detach().to_local().copy_(distribute_tensor(full, p.device_mesh, p.placements).to_local())
    for key, b in model.named_buffers():  # rotary frequencies, which no state dict holds
        b.data = values.get(key, b).to(device())
        dist.broadcast(b, 0)
    lm.generation_config = source.lm.generation_config if values else None  # its stop tokens, for save_pretrained on rank 0
    return model

def full_weights(model: TokenModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Stream a sharded model's (name, whole tensor) pairs, one at a time; every rank must run through all of them."""
    for name, p in model.lm.named_parameters():
        yield name, p.detach().to(device=device(), dtype=dtype).full_tensor()

def save_pretrained(model: TokenModel, tokenizer, folder: Path) -> None:
    """Write an ordinary transformers folder, complete or not at all."""
    weights = {name: tensor.cpu() for name, tensor in full_weights(model, torch.float32) if dist.get_rank() == 0}
    if weights:
        tmp = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        model.lm.save_pretrained(tmp, state_dict=weights)
        tokenizer.save_pretrained(tmp)
        shutil.rmtree(folder, ignore_errors=True)
        tmp.rename(folder)
    dist.barrier()

@dataclass
class Rollout:
    """One response: its tokens, the engine's log-probabilities of them, and its verified outcome in [0, 1]."""
    index: int  # of the problem
    prompt_ids: list[int]
    ids: list[int]
    logps: list[float] | None  # None from the transformers engine, which computes as the trainer does
    truncated: bool = False
    text: str = ""
    outcome: float = 0.0

@dataclass
class Batch:
    """B responses on every rank: whole token sequences, and tensors over response positions."""
    tokens: list[Tensor]  # prompt and response
    prompt_lengths: list[int]
    mask: Tensor  # (B, T)
    outcomes: Tensor  # (B,)
    engine_logps: Tensor | None  # (B, T)

    @staticmethod
    def of(rollouts: list[Rollout]) -> "Batch":
        """Rollouts as tensors."""
        return Batch(tokens=[torch.tensor(r.prompt_ids + r.ids, device=device()) for r in rollouts],
                     prompt_lengths=[len(r.prompt_ids) for r in rollouts],
                     mask=padded([1.0] * len(r.ids) for r in rollouts),
                     outcomes=torch.tensor([r.outcome for r in rollouts], device=device()),
                     engine_logps=padded(r.logps for r in rollouts) if rollouts[0].logps else None)

    def blocks(self, size: int) -> list[range]:
        """Consecutive minibatches of size responses: whole groups, unshuffled."""
        return [range(len(self.tokens))[start:start + size] for start in range(0, len(self.tokens), size)]

def micro_batches(batch: Batch, rows: Iterable[int], cfg: Config) -> Iterator[list[int]]:
    """This rank's share of the given rows, longest first, in micro-batches of --token-budget tokens with padding or of
    one row; every rank gets equally many, the shortest row standing in where their number does not divide the rows'."""
    order, rank, world = sorted(rows, key=lambda i: -len(batch.tokens[i])), dist.get_rank(), dist.get_world_size()
    order += order[-1:] * (-len(order) % world)
    while order:
        size = world * max(1, cfg.token_budget // len(batch.tokens[order[0]]))
        yield order[:size][rank::world]
        order = order[size:]

def token_values(model: TokenModel, batch: Batch, rows: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities (or values) of the given rows' response tokens: (len(rows), T), zero outside the mask."""
    ids = padded(batch.tokens[i] for i in rows)
    predicts = padded(torch.arange(1, len(batch.tokens[i])) >= batch.prompt_lengths[i] for i in rows)
    values = model(ids, predicts, temperature)
    return torch.zeros_like(batch.mask[rows]).masked_scatter(batch.mask[rows].bool(), values)

def assemble(pieces: list[tuple[list[int], Tensor]], batch: Batch) -> Tensor:
    """Each rank's (rows, (len(rows), T)) pieces -> the (B, T) tensor, on every rank."""
    whole = torch.full_like(batch.mask, -torch.inf)
    for rows, values in pieces:
        whole[rows] = values
    dist.all_reduce(whole, dist.ReduceOp.MAX)
    return whole.masked_fill(batch.mask == 0, 0.0)

@torch.no_grad()
def score(model: TokenModel, batch: Batch, cfg: Config, minibatch: int | None = None, temperature: float = 1.0) -> Tensor:
    """token_values of the whole batch without gradients: (B, T), on every rank. It is cut as a training pass with this
    minibatch would cut it, so that equal weights give equal numbers."""
    pieces = [(mine, token_values(model, batch, mine, temperature))
              for rows in batch.blocks(minibatch or len(batch.tokens)) for mine in micro_batches(batch, rows, cfg)]
    model.reshard()  # FSDP keeps the root's parameters gathered for a backward pass that does not come
    return assemble(pieces, batch)

class Learner:
    """A trained model with its optimizer."""

    def __init__(self, model: TokenModel, lr: float, weight_decay: float, grad_clip: float):
        self.model, self.grad_clip = model, grad_clip
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        for p in filter(lambda p: p.requires_grad, model.parameters()):  # now: a checkpoint must not step to make them
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                       "exp_avg_sq": torch.zeros_like(p)}

    def update(self, batch: Batch, rows: Iterable[int], cfg: Config, loss, temperature: float = 1.0) -> tuple[float, float, list]:
        """One optimizer step on the given rows of a batch, in micro-batches. loss(values, mine) is this micro-batch's share
        of a loss with a global denominator. Returns that loss, the gradient norm before the clip, and (mine, values)."""
        pieces, whole = [], torch.zeros((), device=batch.mask.device)
        for mine in micro_batches(batch, rows, cfg):
            values = token_values(self.model, batch, mine, temperature)
            share = loss(values, mine)
            (share * dist.get_world_size()).backward()  # FSDP averages gradients over the ranks
            whole += share.detach()
            pieces.append((mine, values.detach()))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(whole)
        return float(whole), float(norm.full_tensor()), pieces

@dataclass
class Models:
    """What train updates, and the frozen reference; None where the options need none."""
    policy: Learner | None = None
    prm: Learner | None = None
    critic: Learner | None = None
    ref: TokenModel | None = None

def load_models(name: str, cfg: Config) -> Models:
    """Policy, PRM and reference, all from the model called name (Alg. 1), and PPO's critic."""
    models = Models(Learner(load_model(name, cfg), cfg.lr, cfg.weight_decay, cfg.grad_clip))
    if cfg.reward != "outcome":
        models.prm = Learner(load_model(cfg.prm or name, cfg, "--prm"), cfg.prm_lr, 0.0, cfg.prm_grad_clip)
        models.ref = load_model(name, cfg, frozen=True) if cfg.prm_ref == "sft" else None
    if cfg.estimator == "ppo":
        models.critic = Learner(load_model(name, cfg, value_head=True), cfg.prm_lr, 0.0, cfg.grad_clip)
    return models

# ----------------------------------------------------------------------------------------------------------------------
# Rollout (Sec. 3): two engines with one small interface, verification beside generation, the online prompt filter.

class HFEngine:
    """Samples with transformers, from an unsharded copy of the policy on each rank."""

    def __init__(self, name: str, cfg: Config, stop_ids: list[int]):
        from transformers import AutoModelForCausalLM, GenerationConfig
        self.lm = from_pretrained(AutoModelForCausalLM, name, "--model", dtype=getattr(torch, cfg.dtype)).to(device()).eval()
        self.lm.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=stop_ids[0])  # no top-k of its own
        self.stop_ids, self.batch = stop_ids, cfg.rollout_batch

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the policy's weights."""
        own = dict(self.lm.named_parameters())
        for name, tensor in weights:
            own[name].data = tensor

    def sleep(self) -> None:
        """Give their memory to training; each sync sends them anyway."""
        for p in self.lm.parameters():
            p.data = p.data.new_empty(0)

    close = sleep

    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor, k: int):
        """The cache of prompts (b, L) without their last token, which generate reads, K times each."""
        if ids.shape[1] == 1:
            return None
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = self.lm.base_model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1],
                                   use_cache=True).past_key_values
        cache.reorder_cache(torch.arange(len(ids), device=ids.device).repeat_interleave(k))
        return cache

    def generate(self, prompts: list[list[int]], k: int, max_tokens: int, temperature: float, seed: int) -> Iterator[tuple]:
        """K responses a prompt of token ids; yields (prompt number, ids, logps or None, truncated). temperature 0: greedy."""
        torch.manual_seed(seed)
        sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
        order, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), max(1, self.batch // k)
        for chunk in [order[start:start + size] for start in range(0, len(order), size)]:
            ids = padded((prompts[i] for i in chunk), "left")
            mask = padded(([1] * len(prompts[i]) for i in chunk), "left")
            out = self.lm.generate(input_ids=ids.repeat_interleave(k, 0), attention_mask=mask.repeat_interleave(k, 0),
                                   past_key_values=self.prefill(ids, mask, k), max_new_tokens=max_tokens, **sampling)
            for row, tokens in enumerate(out[:, ids.shape[1]:].tolist()):
                length = next((t + 1 for t, token in enumerate(tokens) if token in self.stop_ids), None)
                yield chunk[row // k], tokens[:length], None, length is None

class VLLMEngine:
    """Samples with vLLM, one engine in each rank's process (data-parallel rollouts), asleep while training."""

    def __init__(self, name: str, cfg: Config, stop_ids: list[int]):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in process: weights pass by reference, no process is left over
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else a screenful at each sync
        self.cuda, threads = torch.cuda.is_available(), torch.get_num_threads()
        launcher = {"distributed_executor_backend": "external_launcher"} if "RANK" in os.environ else {}
        blocks = {} if self.cuda else {"block_size": 32}  # else no K responses share a prompt below 128 tokens
        with blaming("--rollout vllm: the engine does not start", "; pip install vllm, another --vllm-memory, or --rollout hf"):
            import vllm
            self.llm = vllm.LLM(
                name, dtype=cfg.dtype, max_model_len=cfg.max_prompt_tokens + cfg.max_response_tokens, seed=cfg.seed,
                gpu_memory_utilization=cfg.vllm_memory, enable_sleep_mode=self.cuda, enforce_eager=not self.cuda,
                logprobs_mode="processed_logprobs", disable_log_stats=True, **launcher, **blocks)
        torch.set_num_threads(threads)  # vLLM leaves one; an Adam in host memory needs them all
        self.llm.llm_engine.engine_core._finalizer.atexit = False  # after a failure: see Sampler.__exit__
        self.params = functools.partial(vllm.SamplingParams, logprobs=0, stop_token_ids=stop_ids, detokenize=False,
                                        output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY)

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Wake, and take the policy's weights."""
        self.llm.wake_up(tags=["weights"])  # does nothing where it is awake
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.cuda:  # the CPU build computes with a packed copy of a tied head, which the reload leaves stale
            self.llm.apply_model(repack_tied_head)
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Give the GPU to training. Level 2 drops the weights too: each sync sends them anyway."""
        if self.cuda:
            self.llm.sleep(level=2)

    def close(self) -> None:
        """Shut the engine down; this also ends torch.distributed, so it comes last."""
        self.llm.wake_up()  # asleep, its memory cannot be freed
        self.llm.llm_engine.engine_core.shutdown()

    def generate(self, prompts: list[list[int]], k: int, max_tokens: int, temperature: float, seed: int) -> Iterator[tuple]:
        """As HFEngine.generate."""
        from transformers import set_seed
        set_seed(seed)  # the engine draws from this process's generators: numpy's on a GPU, torch's on a CPU
        engine, params = self.llm.llm_engine, self.params(temperature=temperature, max_tokens=max_tokens)
        for i, prompt in enumerate(prompts):
            for j in range(k):
                engine.add_request(f"{i}/{j}", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for request in engine.step():
                if request.finished:
                    out = request.outputs[0]
                    logps = [step[token].logprob for step, token in zip(out.logprobs, out.token_ids)]
                    yield int(request.request_id.split("/")[0]), list(out.token_ids), logps, out.finish_reason == "length"

def repack_tied_head(model) -> None:
    """Refresh what vLLM's CPU build computes a tied head's logits with."""
    if getattr(model.config, "tie_word_embeddings", False):
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

def uses_vllm(cfg: Config) -> bool:
    """Whether --rollout asks for vLLM on this machine."""
    return cfg.rollout == "vllm" or cfg.rollout == "auto" and torch.cuda.is_available() and find_spec("vllm") is not None

def make_engine(name: str, tokenizer, cfg: Config):
    """The engine that --rollout asks for."""
    from transformers import GenerationConfig
    stop = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):  # a model may lack a generation_config.json
        ids = GenerationConfig.from_pretrained(name).eos_token_id
        stop |= set(ids if isinstance(ids, list) else [ids])
    if not stop - {None}:
        raise UserError(f"--model {name} names no end-of-sequence token: set eos_token in its tokenizer")
    return (VLLMEngine if uses_vllm(cfg) else HFEngine)(name, cfg, sorted(stop - {None}))

class Sampler:
    """What turns prompts into verified rollouts: an engine and a verifier on each rank."""

    def __init__(self, name: str, tokenizer, cfg: Config):
        self.tokenizer, self.cfg = tokenizer, cfg
        self.verifier = verify.Verifier(timeout=cfg.verify_timeout, sandbox=cfg.sandbox)  # before vLLM hides the local ranks
        self.engine = make_engine(name, tokenizer, cfg)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.verifier.__exit__(*error)
        if not any(error):  # on one rank's failure the others, deep in a step, take no part in ending the groups
            self.engine.close()

    @contextlib.contextmanager
    def awake(self, policy: Learner | None):
        """The engine awake with the policy's weights, asleep afterwards; without a policy it stays as it was built."""
        if policy:
            self.engine.sync(full_weights(policy.model, getattr(torch, self.cfg.dtype)))
        yield
        if policy:
            self.engine.sleep()

    def sample(self, problems: Problems, prompts: list[tuple[int, list[int]]], k: int, temperature: float, seed: str,
               bar: tqdm | None = None) -> list[list[Rollout]]:
        """K verified rollouts of each (problem index, token ids), in the order given, on every rank. The prompts are dealt
        over the ranks; a response goes to the verifier while others are still being generated."""
        rank, world, cfg = dist.get_rank(), dist.get_world_size(), self.cfg
        mine, futures = prompts[rank::world], []
        groups = [[] for _ in mine]
        number = random.Random(f"{cfg.seed} {seed} rank {rank}").getrandbits(31)
        for i, ids, logps, truncated in self.engine.generate([p for _, p in mine], k, cfg.max_response_tokens, temperature, number):
            index, prompt_ids = mine[i]
            text, problem = self.tokenizer.decode(ids, skip_special_tokens=True), problems[index]
            try:
                future = self.verifier.submit(text, problem.task, problem.reference)
            except RuntimeError as e:  # no sandbox for programs
                raise UserError(f"--sandbox {cfg.sandbox}: {e}") from None
            groups[i].append(Rollout(index, prompt_ids, ids, logps, truncated, text))
            futures.append((groups[i][-1], future))
            bar and bar.update(world)
        for rollout, future in futures:
            rollout.outcome = float(future.result())
        parts = gather(groups)
        return [parts[i % world][i // world] for i in range(len(prompts))]

def accuracy_filter(outcomes: Tensor, group_size: int, low: float, high: float) -> Tensor:
    """Online prompt filter (Sec. 3): outcomes (P*K,) -> (P,) bool, mean accuracy in [low, high] to 1e-6."""
    accuracy = outcomes.view(-1, group_size).double().mean(-1)
    return (accuracy >= low - 1e-6) & (accuracy <= high + 1e-6)

def collect_rollouts(sampler: Sampler, queue: PromptQueue, cfg: Config, step: int) -> tuple[list[Rollout], list[Rollout], dict]:
    """Algorithm 1's sampling: draw, verify and filter groups until the batch is full; groups are accepted in the order
    drawn, prompts of surplus groups return to the queue. Returns (rollouts kept, all rollouts considered, metrics)."""
    kept, considered, drawn = [], [], 0
    while len(kept) < cfg.prompts_per_step:
        if drawn >= cfg.max_draws * cfg.prompts_per_step:
            accuracy = sum(r.outcome for group in considered for r in group) / (len(considered) * cfg.group_size)
            raise UserError(f"--data {cfg.data}: only {len(kept)} of {cfg.prompts_per_step} prompts passed the filter in {drawn} "
                            f"draws, mean accuracy {accuracy:.2f}; fitting problems, wider --filter-low and --filter-high or "
                            "a larger --max-draws would help")
        prompts = queue.draw(math.ceil((cfg.prompts_per_step - len(kept)) / queue.state["pass_rate"]))
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
    batch, responses = ([r for group in groups for r in group] for groups in (kept, considered))
    return batch, responses, {
        "rollout/accuracy": fmean(r.outcome for r in responses),
        "reward/outcome": fmean(r.outcome for r in batch),
        "rollout/kept_prompts": len(kept), "rollout/considered_prompts": len(considered), "rollout/drawn_prompts": drawn,
        "rollout/equal_groups": sum(len({r.outcome for r in group}) == 1 for group in kept),
        "rollout/truncated": fmean(r.truncated for r in responses),
        "rollout/length": fmean(len(r.ids) for r in responses), "rollout/too_long_prompts": queue.state["too_long"],
        "rollout/epoch": queue.state["position"] // len(queue.problems)}

# ----------------------------------------------------------------------------------------------------------------------
# Implicit process reward (Eq. 3) and the PRM's loss. From here on the mathematics: tensors in, tensors out.

NORM_FLOOR = 1e-3  # a batch whose largest |reward-to-go| is below this holds rounding noise, not rewards

def implicit_rewards(prm_logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_phi(y_t) = beta * log(pi_phi(y_t | y_<t) / pi_ref(y_t | y_<t)), Eq. 3. All (B, T); zero outside the mask."""
    return beta * (prm_logps - ref_logps) * mask

def prm_loss(process_rewards: Tensor, outcomes: Tensor, mask: Tensor, denominator: float | None = None) -> Tensor:
    """Cross-entropy of sigma(R_phi(y)), R_phi = sum_t r_phi(y_t), on outcomes (B,) in [0, 1]: (B, T) -> ().
    denominator: responses of the global minibatch (default: of this call), so that micro-batches add up to its mean."""
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
    """How well R_phi (B,) tells right (outcome above 1/2) from wrong. Chance is 0.5 for auc and for pair_accuracy, over
    the pairs of a group whose outcomes differ; accuracy is to be read beside the majority's share."""
    def ordered(high, low, pairs):
        margins = (high - low)[pairs]
        return float(((margins > 0) + 0.5 * (margins == 0)).mean()) if margins.numel() else 0.5

    right, share = outcomes > 0.5, float((outcomes > 0.5).float().mean())
    r, o = sequence_rewards.view(-1, group_size), outcomes.view(-1, group_size)
    return {"auc": ordered(sequence_rewards[:, None], sequence_rewards[None, :], right[:, None] & ~right[None, :]),
            "pair_accuracy": ordered(r[:, :, None], r[:, None, :], o[:, :, None] > o[:, None, :]),
            "accuracy": float(((sequence_rewards > 0) == right).float().mean()), "majority": max(share, 1 - share)}

def score_and_update_prm(prm: Learner | None, ref_logps: Tensor | None, batch: Batch, cfg: Config) -> tuple[Tensor | None, dict]:
    """The batch's process rewards (B, T), detached, the PRM's updates on its outcomes, and metrics; None without a PRM.
    --prm-update says which PRM scores a response: single, the forward of its own training minibatch (as published);
    score-first, the PRM before any update; double, the PRM after all; none, a PRM that is never updated."""
    if prm is None:
        return None, {}

    def score_all():
        return score(prm.model, batch, cfg, cfg.prm_minibatch)

    def rewards_of(logps, mine=slice(None)):
        return implicit_rewards(logps, ref_logps[mine], batch.mask[mine], cfg.beta)

    updates = []
    scores = score_all() if cfg.prm_update in ("score-first", "none") else None
    for rows in batch.blocks(cfg.prm_minibatch) if cfg.prm_update != "none" else []:
        if cfg.prm_loss == "dpo":  # dL/dR_phi(y) from a pass without gradients, so that micro-batches may split groups
            sums = rewards_of(score_all()).sum(-1).requires_grad_()
            dpo = dpo_loss(sums[rows], batch.outcomes[rows], cfg.group_size)
            slope, = torch.autograd.grad(dpo, sums)
            _, *others = prm.update(batch, rows, cfg, lambda logps, mine: (rewards_of(logps, mine).sum(-1) * slope[mine]).sum())
            updates.append((float(dpo.detach()), *others))
        else:
            updates.append(prm.update(batch, rows, cfg, lambda logps, mine: prm_loss(
                rewards_of(logps, mine), batch.outcomes[mine], batch.mask[mine], len(rows))))
    losses, norms, pieces = zip(*updates) if updates else ([], [], [])
    if scores is None:
        scores = assemble(sum(pieces, []), batch) if cfg.prm_update == "single" else score_all()
    rewards = rewards_of(scores)
    metrics = {f"prm/{key}": value for key, value in prm_metrics(rewards.sum(-1), batch.outcomes, cfg.group_size).items()}
    if losses:
        metrics |= {"prm/loss": fmean(losses), "prm/first_loss": losses[0], "prm/grad_norm": fmean(norms)}
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
    r * K/(K-1) - (sum of all K token means)/(K-1), which stretches by K/(K-1) what varies inside a response."""
    assert group_size > 1, "leave-one-out needs two responses a prompt"
    means = token_means(process_rewards, mask)
    centered = process_rewards - leave_one_out(means, group_size)[:, None]
    if baseline == "official":
        centered = centered + (process_rewards - means[:, None]) / (group_size - 1)
    return (discounted_returns(centered * mask, gamma) + (outcomes - leave_one_out(outcomes, group_size))[:, None]) * mask

def reinforce_advantages(process_rewards: Tensor, outcomes: Tensor, mask: Tensor, group_size: int, gamma: float = 1.0,
                         baseline: str = "") -> Tensor:
    """Eq. 8: A_t = r_o + sum_{s>=t} gamma^(s-t) r_phi(y_s), without a baseline. Shapes as rloo_advantages."""
    return (discounted_returns(process_rewards * mask, gamma) + outcomes[:, None]) * mask

def grpo_advantages(process_rewards: Tensor, outcomes: Tensor, mask: Tensor, group_size: int, gamma: float = 1.0,
                    baseline: str = "") -> Tensor:
    """Eq. 7: outcomes standardised in their group, process rewards by the mean and std of the group's token means.
    Shapes as rloo_advantages. Standard deviations are unbiased; 1e-6 is added to them."""
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

# PPO's is that of its process part, which has no baseline; its outcome part is GAE's.
ESTIMATORS = {"rloo": rloo_advantages, "reinforce": reinforce_advantages, "grpo": grpo_advantages, "ppo": reinforce_advantages}

def estimate_advantages(process_rewards: Tensor | None, batch: Batch, cfg: Config,
                        values: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The advantages (B, T) that the options ask for, and the targets (B, T) of PPO's critic, whose values (B, T) are
    given. process_rewards (B, T): None without a PRM."""
    mask, outcomes, targets, none = batch.mask, batch.outcomes, None, torch.zeros_like(batch.mask)
    rewards = none if process_rewards is None else process_rewards
    last = F.pad(mask, (0, 1)).diff(dim=-1) == -1  # each response's last token
    if cfg.prm_role == "value":  # v_phi(y_<t) is what the PRM credits the response with before token t
        advantages = (outcomes[:, None] - (rewards.cumsum(-1) - rewards)) * mask
        return whiten(advantages, mask) if cfg.whiten else advantages, None
    if not cfg.last_token:
        rewards = rewards * ~last
    if cfg.granularity == "whole":
        rewards = last * rewards.sum(-1, keepdim=True)
    if cfg.normalize:
        rewards = normalize_rewards(rewards, mask)
    estimator = ESTIMATORS[cfg.estimator]
    if cfg.granularity == "whole":  # R_phi(y) as a second outcome
        process_part = estimator(none, rewards.sum(-1), mask, cfg.group_size)
    else:
        process_part = estimator(rewards, none[:, 0], mask, cfg.group_size, cfg.gamma, cfg.process_baseline)
    if cfg.estimator == "ppo":
        outcome_part, targets = gae_advantages(last * outcomes[:, None], values, mask, 1.0, 1.0)
    else:
        outcome_part = estimator(none, outcomes, mask, cfg.group_size)
    advantages = cfg.process_weight * process_part + cfg.outcome_weight * (cfg.reward != "process") * outcome_part
    return whiten(advantages, mask) if cfg.whiten else advantages, targets

# ----------------------------------------------------------------------------------------------------------------------
# Policy loss and update (Eq. 6).

def ppo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float,
             denominator: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-sum min(rho A, clip(rho, 1-eps, 1+eps) A) / denominator, Eq. 6: all (B, T) -> loss and clip fraction, both ().
    denominator: tokens of the global minibatch (default: of this call). mask may hold weights in place of ones."""
    denominator = mask.sum() if denominator is None else denominator
    ratio = torch.exp(logps - old_logps)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -(torch.min(plain, clipped) * mask).sum() / denominator, ((clipped < plain) * mask).sum() / denominator

def update_policy(policy: Learner, batch: Batch, advantages: Tensor, old_logps: Tensor | None, cfg: Config, step: int) -> dict:
    """PPO's clipped updates over shuffled minibatches of whole responses; returns metrics.
    old_logps (B, T): None where one update a batch makes the first forward's own log-probabilities the old ones."""
    weights = batch.mask / batch.mask.sum(-1, keepdim=True) if cfg.loss_average == "sequence" else batch.mask
    clipped, updates = torch.zeros((), device=batch.mask.device), []

    def loss_of(logps, mine):
        old = logps.detach() if old_logps is None else old_logps[mine]
        weight = weights[mine]
        if cfg.importance_cap:
            weight = weight * torch.exp(old - batch.engine_logps[mine]).clamp(max=cfg.importance_cap)
        loss, clip_fraction = ppo_loss(logps, old, advantages[mine], weight, cfg.clip, denominator)
        clipped.add_(clip_fraction)
        return loss

    order = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    for _ in range(cfg.ppo_epochs):
        for rows in torch.randperm(len(batch.tokens), generator=order).split(cfg.minibatch):
            denominator = weights[rows].sum()
            updates.append(policy.update(batch, rows.tolist(), cfg, loss_of, cfg.temperature))
    losses, norms, pieces = zip(*updates)
    dist.all_reduce(clipped)
    old_logps = assemble(sum(pieces, []), batch) if old_logps is None else old_logps
    metrics = {"policy/loss": fmean(losses), "policy/clip_fraction": float(clipped) / len(losses),
               "policy/grad_norm": fmean(norms), "policy/entropy": float(-old_logps.sum() / batch.mask.sum())}
    if batch.engine_logps is not None:  # engine and trainer compute the same policy
        gap = ((old_logps - batch.engine_logps) * batch.mask).abs()
        metrics |= {"rollout/engine_gap": float(gap.sum() / batch.mask.sum()), "rollout/engine_gap_max": float(gap.max())}
    return metrics

def update_critic(critic: Learner | None, batch: Batch, targets: Tensor | None, cfg: Config) -> dict:
    """PPO's critic: half the squared error of V(y_<t) against targets (B, T), in minibatches of the policy's size."""
    losses = [critic.update(batch, rows, cfg, lambda values, mine: (
        0.5 * (values - targets[mine]) ** 2 * batch.mask[mine]).sum() / batch.mask[rows].sum())[0]
        for rows in batch.blocks(cfg.minibatch)] if critic else []
    return {"critic/loss": fmean(losses)} if critic else {}

# ----------------------------------------------------------------------------------------------------------------------
# Around the algorithm: SFT warm-up (App. D), evaluation, the run folder and its checkpoints.

def sft_example(row: dict, tokenizer, cfg: Config, where: str) -> Rollout:
    """A worked response, its end of turn included, from Eurus-2-SFT-Data's schema or columns prompt and response."""
    prompt, response = row.get("prompt"), row.get("response")
    if row.get("conversations"):
        prompt, response = [message.get("value") for message in (row["conversations"] + [{}])[:2]]
        if row.get("system"):
            prompt = [{"role": "system", "content": row["system"]}, {"role": "user", "content": prompt}]
    if not prompt or not isinstance(prompt, (str, list)) or not isinstance(response, str):
        raise UserError(f"{where}: an SFT row holds prompt and response, or conversations")
    prompt_ids = encode_prompt(prompt, tokenizer, cfg)
    if cfg.template != "chat":
        return Rollout(0, prompt_ids, tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id], None)
    chat = as_chat(prompt, cfg)  # the response is what the template puts behind the opening of the assistant's turn
    opening = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    turn = tokenizer.apply_chat_template(chat + [{"role": "assistant", "content": response}], tokenize=False)
    if not turn.startswith(opening):
        raise UserError("--template chat: the template writes a turn unlike the opening it makes for one; give --template none")
    return Rollout(0, prompt_ids, tokenizer(turn[len(opening):].rstrip(), add_special_tokens=False)["input_ids"], None)

def sft_batches(rows, tokenizer, cfg: Config) -> Iterator[tuple[Batch, int]]:
    """Shuffled batches of exactly --sft-batch examples, and how many were left out so far, over the limits of prompt or
    response."""
    too_long = 0
    for epoch in range(cfg.sft_epochs):
        examples = []
        for i in shuffled(len(rows), f"{cfg.seed} sft {epoch}"):
            example = sft_example(rows[i], tokenizer, cfg, f"--sft-data {cfg.sft_data}, line {i + 1}")
            if len(example.prompt_ids) > cfg.max_prompt_tokens or len(example.ids) > cfg.max_response_tokens:
                too_long += 1
                continue
            examples.append(example)
            if len(examples) == cfg.sft_batch:
                yield Batch.of(examples), too_long
                examples = []

def train_sft(name: str, tokenizer, cfg: Config, run: "Run") -> None:
    """Maximise the likelihood of worked responses, the loss on responses only; leaves the folder RUN/sft."""
    from transformers import get_cosine_schedule_with_warmup
    rows = miniature_sft_rows(cfg.seed) if cfg.sft_data == "miniature" else load_rows(cfg.sft_data, "--sft-data")
    updates = cfg.sft_epochs * (len(rows) // cfg.sft_batch)
    if not updates:
        raise UserError(f"--sft-data {cfg.sft_data} holds {len(rows)} rows, fewer than --sft-batch {cfg.sft_batch}")
    learner = Learner(load_model(name, cfg), cfg.sft_lr, 0.0, 1.0)
    schedule = get_cosine_schedule_with_warmup(learner.optimizer, updates // 10, updates)
    step = 0
    with run.bar(updates, "SFT") as bar:
        for step, (batch, too_long) in enumerate(sft_batches(rows, tokenizer, cfg), 1):
            tokens = batch.mask.sum()
            loss, norm, _ = learner.update(batch, range(cfg.sft_batch), cfg, lambda logps, mine: -logps.sum() / tokens)
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            run.log({"sft/step": step, "sft/loss": loss, "sft/grad_norm": norm, "sft/too_long": too_long})
    if not step:
        raise UserError("--max-prompt-tokens, --max-response-tokens: too few examples of --sft-data are short enough")
    save_pretrained(learner.model, tokenizer, run.folder / "sft")

def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of P(one of k samples is right) from `right` of n: 1 - C(n-right, k) / C(n, k)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)

def majority_vote(group: list[Rollout]) -> float:
    """Outcome of the answer that most responses of a group give; equal answers count together, the first of equals wins."""
    answers = [verify.extract_answer(r.text) for r in group]
    votes = [sum(a == b or verify.math_equal(a, b) for b in answers if b) if a else 0 for a in answers]
    return group[votes.index(max(votes))].outcome

def process_rewards_of(rollouts: list[Rollout], models: Models, cfg: Config) -> Tensor:
    """Implicit process rewards (B, T) of rollouts, by the PRM as it is."""
    batch = Batch.of(rollouts)
    ref_logps = score(models.ref or models.policy.model, batch, cfg)
    return implicit_rewards(score(models.prm.model, batch, cfg), ref_logps, batch.mask, cfg.beta)

def evaluate(sampler: Sampler, sets: list[Problems], models: Models, cfg: Config, run: "Run", step: int) -> dict:
    """Greedy pass@1 and, with --eval-samples N, avg@N, pass@k and majority vote, each with its standard error; with
    --eval-only, best-of-N by R_phi. RUN/eval gets every response, and a page of some shaded by process reward."""
    metrics, n = {}, cfg.eval_samples
    for problems in sets:
        name, figures = problems.title, {}
        encoded = [(i, encode_prompt(problems[i].prompt, sampler.tokenizer, cfg)) for i in range(len(problems))]
        prompts = [(i, ids) for i, ids in encoded if len(ids) <= cfg.max_prompt_tokens]
        if not prompts:
            raise UserError(f"--max-prompt-tokens {cfg.max_prompt_tokens}: all prompts of {problems.name} are longer")
        with sampler.awake(models.policy), run.bar(len(prompts) * (1 + n), f"evaluate {name}") as bar:
            greedy = sampler.sample(problems, prompts, 1, 0.0, "greedy", bar)
            groups = sampler.sample(problems, prompts, n, cfg.eval_temperature, "eval", bar) if n else [[] for _ in prompts]
        right = [sum(r.outcome >= 1 for r in group) for group in groups]  # a program that fails a test is wrong
        figures["greedy"] = [float(group[0].outcome >= 1) for group in greedy]
        if n:
            figures[f"avg@{n}"] = [count / n for count in right]
        for k in [2 ** j for j in range(1, n.bit_length())]:
            figures[f"pass@{k}"] = [pass_at_k(n, count, k) for count in right]
        if n and problems[prompts[0][0]].task == "math":
            figures[f"majority@{n}"] = [majority_vote(group) for group in groups]
        if n and models.prm and cfg.eval_only:
            sums = process_rewards_of([r for group in groups for r in group], models, cfg).sum(-1).view(-1, n)
            figures[f"best_of@{n}"] = [float(group[best].outcome >= 1) for group, best in zip(groups, sums.argmax(-1).tolist())]
        metrics |= {f"eval/{name}/problems": len(prompts), f"eval/{name}/too_long": len(encoded) - len(prompts)}
        for key, values in figures.items():
            error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            metrics |= {f"eval/{name}/{key}": fmean(values), f"eval/{name}/{key}_se": error}
        lines = [{"index": i, "prompt": problems[i].prompt, "reference": problems[i].reference} | {
            key: [{"text": r.text, "score": r.outcome} for r in group] for key, group in (("greedy", g), ("samples", s))}
            for (i, _), g, s in zip(prompts, greedy, groups)]
        run.write(f"eval/step-{step}-{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if models.prm and (cfg.inspect or not cfg.eval_only and PAGE.exists()):
            page = inspect_page(problems, groups if n else greedy, models, sampler.tokenizer, cfg, step)
            run.write(f"eval/step-{step}-{name}.html", page)
    return metrics

PAGE = Path(__file__).parent / "assets" / "inspect.html"  # the page without its data

def token_texts(ids: list[int], tokenizer) -> list[str]:
    """The text of each token behind the one before it; of a character in pieces, the last one has it."""
    texts, start, end = [], 0, 0
    for t in range(1, len(ids) + 1):
        before, text = tokenizer.decode(ids[start:end]), tokenizer.decode(ids[start:t])
        whole = not text.endswith("\ufffd") or t == len(ids)
        texts.append(text[len(before):] if whole else "")
        start, end = (end, t) if whole else (start, end)
    return texts

def inspect_page(problems: Problems, groups: list[list[Rollout]], models: Models, tokenizer, cfg: Config, step: int) -> str:
    """A self-contained page of 16 groups, those with right and wrong responses first, each token with its reward."""
    groups = sorted(groups, key=lambda group: len({r.outcome for r in group}) == 1)[:16]
    rewards, shown = iter(process_rewards_of([r for group in groups for r in group], models, cfg).tolist()), []
    for group in groups:
        responses, problem = [], problems[group[0].index]
        for r, row in zip(group, rewards):
            tokens = list(zip(token_texts(r.ids, tokenizer), row))
            responses.append({"outcome": r.outcome, "reward": sum(row), "tokens": tokens})
        shown.append({"prompt": str(problem.prompt), "reference": str(problem.reference), "responses": responses})
    data = {"title": "PRIME: implicit process rewards", "set": problems.name, "step": step, "beta": cfg.beta, "groups": shown}
    script = json.dumps(data).replace("<", "\\u003c")  # no text can end it
    return PAGE.read_text(encoding="utf-8").replace('"@DATA@"', script)

def reporter(kind: str, folder: Path, config: dict):
    """A function of (metrics, step) that feeds tensorboard or wandb."""
    with blaming(f"--report-to {kind}: it does not start", f"; pip install {kind}, or leave it out"):
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(folder)
            return lambda metrics, step: [writer.add_scalar(key, value, step) for key, value in metrics.items()]
        import wandb
        wandb.init(project="prime", name=folder.name, config=config)
        return wandb.log

class Run:
    """The run folder: config.json, metrics.jsonl, checkpoints, evaluations, models. Rank 0 alone writes."""

    def __init__(self, cfg: Config):
        self.folder, self.main = Path(gather(cfg.output)[0]), dist.get_rank() == 0
        self.metrics, self.seconds, self.interrupted = self.folder / "metrics.jsonl", Counter(), False
        if self.main and not cfg.resume and self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise UserError(f"--output {self.folder} is taken: choose another, or --resume it")
        config = dataclasses.asdict(cfg)
        self.report = reporter(cfg.report_to, self.folder, config) if self.main and cfg.report_to != "none" else None
        self.write("config.json", json.dumps(config | {"resume": None}, indent=1) + "\n")
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
        if self.report and "step" in metrics:
            self.report(metrics, metrics["step"])

    def rewind(self, size: int) -> None:
        """Move what metrics.jsonl holds beyond size bytes to a backup: those steps run anew."""
        if self.main and self.metrics.stat().st_size > size:
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
        def finish(*_):
            self.interrupted = True
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
            tqdm.write("interrupted: finishing this step, then saving; once more quits at once", file=sys.stderr)

        signal.signal(signal.SIGINT, finish)

    def end_step(self, step: int, metrics: dict, bar: tqdm) -> None:
        """Log a step and print its line."""
        metrics |= {f"time/{phase}": seconds for phase, seconds in self.seconds.items()} | {"time/step": sum(self.seconds.values())}
        self.seconds.clear()
        self.log({"step": step} | metrics)
        bar.update()
        if self.main:
            shown = [f"{label} {metrics[key]:.3g}" for label, key in STEP_LINE.items() if key in metrics]
            tqdm.write(f"step {step}: " + ", ".join(shown))

    def summary(self) -> None:
        """Print the first and the last evaluation side by side, and where the results lie."""
        if self.main:
            lines = [json.loads(line) for line in self.metrics.read_text().splitlines() if '"eval/' in line]
            for key in [key for key in lines[-1] if key + "_se" in lines[-1]] if lines else []:
                cells = [f"{line[key]:.3f} ± {line[key + '_se']:.3f} (step {line['step']})" for line in lines[:1] + lines[1:][-1:]]
                tqdm.write(f"{key[5:]:28} {lines[-1][key.rsplit('/', 1)[0] + '/problems']} problems   {'  ->  '.join(cells)}")
            tqdm.write(f"results: {self.folder}")

STEP_LINE = {"accuracy": "rollout/accuracy", "kept": "rollout/kept_prompts", "of": "rollout/considered_prompts",
             "length": "rollout/length", "PRM loss": "prm/loss", "AUC": "prm/auc", "pairs": "prm/pair_accuracy",
             "policy loss": "policy/loss", "clipped": "policy/clip_fraction", "norm": "policy/grad_norm", "seconds": "time/step",
             "rollout": "time/rollout", "ref": "time/ref", "PRM": "time/prm", "critic": "time/critic", "policy": "time/policy"}

def checkpointed(models: Models) -> dict:
    """The models and optimizers of all learners: torch's distributed checkpoints read and write these objects as they are."""
    learners = {name: learner for name, learner in vars(models).items() if isinstance(learner, Learner)}
    return {f"{name}-{part}": vars(x)[part] for name, x in learners.items() for part in ("model", "optimizer")}

def save_checkpoint(run: Run, step: int, models: Models, queue: PromptQueue) -> None:
    """Write RUN/checkpoints/step-N: under another name, synced, renamed; only then the older one goes. All randomness is
    drawn from seeds named by step and purpose, so the step number is the random state."""
    import torch.distributed.checkpoint as dcp
    folder = run.folder / "checkpoints"
    tmp, final = folder / f"step-{step}.tmp", folder / f"step-{step}"
    if run.main:
        shutil.rmtree(tmp, ignore_errors=True)
    dcp.save(checkpointed(models), checkpoint_id=tmp)
    if run.main:
        progress = {"metrics_bytes": run.metrics.stat().st_size, "queue": queue.state}
        (tmp / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(final, ignore_errors=True)
        os.sync()  # the checkpoint, and the metrics that it counts
        tmp.rename(final)
        os.sync()
        for old in set(folder.iterdir()) - {final}:
            shutil.rmtree(old)
    dist.barrier()

def load_checkpoint(run: Run, models: Models, queue: PromptQueue, cfg: Config) -> int:
    """Load the newest complete checkpoint, on any number of processes, and rewind the metrics; returns its step. Where
    there is none, the run starts at step 0, which is saved if SFT came before it."""
    import torch.distributed.checkpoint as dcp
    steps = [int(path.name[5:]) for path in run.folder.glob("checkpoints/step-*") if path.name[5:].isdigit()]
    if not steps:
        save_checkpoint(run, 0, models, queue) if cfg.sft_data else run.rewind(0)
        return 0
    folder = run.folder / "checkpoints" / f"step-{max(steps)}"
    with blaming(f"--resume {run.folder}: its checkpoint cannot be loaded"):
        try:
            dcp.load(checkpointed(models), checkpoint_id=folder)
        except dcp.api.CheckpointException as e:  # no Exception itself, it holds each rank's
            raise next(iter(e.failures.values()))[0] from None
        progress = json.loads((folder / "progress.json").read_text())
    run.rewind(progress["metrics_bytes"])
    queue.state = progress["queue"]
    return max(steps)

@functools.cache
def matmul_flops(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on this device."""
    from torch.utils.benchmark import Timer
    n = 8192 if torch.cuda.is_available() else 768
    a = torch.ones(n, n, device=device(), dtype=dtype)
    product = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())  # waits for the result
    return 2 * n ** 3 / min(product.timeit(1).mean for _ in range(4))

def throughput(run: Run, considered: list[Rollout], batch: Batch, first: tuple, models: Models, metrics: dict, cfg: Config) -> dict:
    """Tokens a second, and model-FLOPs utilisation: of matmul_flops, at 2 operations a parameter and token forward, 4 more
    backward. first: first_logps' results. Not counted: attention, prompts of rollouts, passes of the PRM besides its training."""
    tokens, parameters = sum(map(len, batch.tokens)), sum(p.numel() for p in models.policy.model.parameters())
    passes = len({id(logps) for logps in first if logps is not None})
    peak, figures = matmul_flops(getattr(torch, cfg.dtype)) * dist.get_world_size(), {}
    for phase, count, operations in (("rollout", sum(len(r.ids) for r in considered), 2), ("ref", passes * tokens, 2),
                                     ("prm", tokens, 6), ("critic", tokens, 6), ("policy", cfg.ppo_epochs * tokens, 6)):
        if count and (operations == 2 or f"{phase}/loss" in metrics):  # the phase took place
            speed = figures[f"tokens_per_second/{phase}"] = count / run.seconds[phase]
            figures[f"mfu/{phase}"] = operations * parameters * speed / peak
    return figures

# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 1.

def starting_model(cfg: Config, run: Run) -> tuple[str, object]:
    """The SFT model (a name or folder) that policy, PRM and reference start from, trained here if asked; its tokenizer."""
    name = cfg.model or str(run.folder / "init")
    if not cfg.model and run.main:
        make_miniature_model(Path(name), cfg.seed)
    dist.barrier()
    tokenizer = load_tokenizer(name, cfg)
    if cfg.sft_data and not (run.folder / "sft").exists():
        run.rewind(0)
        train_sft(name, tokenizer, cfg, run)
        gc.collect()  # its weights lie in reference cycles, and three models load next
    return str(run.folder / "sft") if cfg.sft_data else name, tokenizer

def first_logps(models: Models, batch: Batch, cfg: Config) -> tuple[Tensor | None, Tensor | None]:
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
    sums, outcomes = process_rewards_of(considered, models, cfg).sum(-1).cpu(), torch.tensor([r.outcome for r in considered])
    return {f"prm/all_{key}": value for key, value in prm_metrics(sums, outcomes, cfg.group_size).items()}

def train(cfg: Config, run: Run) -> int:
    """Algorithm 1, from an SFT model that --sft-data makes first. Returns the exit code."""
    problems = Problems(cfg.data, cfg) if cfg.steps else None
    eval_sets = [Problems(name, cfg, "test", "--eval-data") for name in cfg.eval_data or []]
    name, tokenizer = starting_model(cfg, run)
    if not cfg.steps:
        run.summary()
        return 0
    queue, models = PromptQueue(problems, tokenizer, cfg), load_models(name, cfg)
    first = load_checkpoint(run, models, queue, cfg)
    run.catch_interrupt()
    with Sampler(name, tokenizer, cfg) as sampler, run.bar(cfg.steps, "PRIME", first) as bar:
        if first == 0:
            run.log({"step": 0} | evaluate(sampler, eval_sets, models, cfg, run, 0))
        for step in range(first + 1, cfg.steps + 1):
            with run.timed("rollout"), sampler.awake(models.policy):  # sample K responses a prompt, verify, filter
                kept, considered, metrics = collect_rollouts(sampler, queue, cfg, step)
            batch = Batch.of(kept)
            with run.timed("probe"):  # nothing, but with --prm-probe-every
                metrics |= probe_prm(models, considered, cfg, step)
            with run.timed("ref"):
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
            metrics |= throughput(run, considered, batch, (old_logps, ref_logps), models, metrics, cfg)
            stop = any(gather(run.interrupted))
            if step == cfg.steps or cfg.eval_every and step % cfg.eval_every == 0 and not stop:
                metrics |= evaluate(sampler, eval_sets, models, cfg, run, step)
            run.end_step(step, metrics, bar)
            if stop or step == cfg.steps or cfg.save_every and step % cfg.save_every == 0:
                save_checkpoint(run, step, models, queue)
            if stop and step < cfg.steps:
                return 130
        save_pretrained(models.policy.model, tokenizer, run.folder / "policy")
        if models.prm:
            save_pretrained(models.prm.model, tokenizer, run.folder / "prm")
        run.summary()
    return 0

def evaluate_only(cfg: Config, run: Run) -> int:
    """--eval-only: --model on --eval-data, best-of-N by --prm. Returns the exit code."""
    tokenizer, models = load_tokenizer(cfg.model, cfg), Models()
    sets = [Problems(name, cfg, "test", "--eval-data") for name in cfg.eval_data]
    if cfg.prm:
        models.prm = Learner(load_model(cfg.prm, cfg, "--prm", frozen=True), 0.0, 0.0, 0.0)
        models.ref = load_model(cfg.prm_ref, cfg, "--prm-ref", frozen=True)
    with Sampler(cfg.model, tokenizer, cfg) as sampler:
        run.log({"step": 0} | evaluate(sampler, sets, models, cfg, run, 0))
        run.summary()
    return 0

# ----------------------------------------------------------------------------------------------------------------------
# The command line.

def parse_args(argv: list[str]) -> Config:
    """Options given by hand win over the miniature's overrides, these over the paper's defaults. A resumed run has its
    own config, of which only the number of steps may change."""
    from transformers import HfArgumentParser
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    parser = HfArgumentParser(SECTIONS, usage="python prime.py [options]", description=__doc__.split("\n\n")[0], allow_abbrev=False)

    def error(message):
        raise UserError(message)

    parser.error, saved = error, {}
    given = parser.parse_args(argv)
    if given.resume:
        with blaming(f"--resume {given.resume}: no config.json of a run there, so no run to go on with"):
            saved = json.loads((Path(given.resume) / "config.json").read_text())
            Config(**saved)
        parser.set_defaults(**saved)
    elif given.data == "miniature" or not (given.data or given.sft_data or given.eval_only):
        parser.set_defaults(**MINIATURE | ({} if given.model else MINIATURE_SFT))
    cfg = Config(**vars(parser.parse_args(argv)))
    for name in set(saved) - {"resume", "output", "steps"}:
        if getattr(cfg, name) != saved[name]:
            raise UserError(f"{flag(name)} conflicts with the run's {name} {saved[name]}: --resume changes --steps only")
    cfg.output = given.resume or cfg.output or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return cfg

def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    rank, world, run = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), None
    try:
        cfg = parse_args(sys.argv[1:] if argv is None else argv)
        check_config(cfg, world)
        setup_distributed()
        run = Run(cfg)
        code = evaluate_only(cfg, run) if cfg.eval_only else train(cfg, run)
        if dist.is_initialized():  # else vLLM's end has ended it
            dist.destroy_process_group()
        return code
    except (UserError, OSError) as e:
        message = str(e)
        if run and run.main and not cfg.resume and not run.metrics.stat().st_size:
            shutil.rmtree(run.folder)  # nothing had begun: the corrected command may take this folder
    except RuntimeError as e:
        if not re.search("out of memory|can't allocate memory", str(e), re.IGNORECASE):
            raise
        message = ("out of memory; what helps: a smaller --token-budget, --activation-checkpointing, --prm-ref policy, "
                   f"--cpu-offload, a smaller --vllm-memory or --rollout-batch, more GPUs ({str(e).split('. ')[0]})")
    except KeyboardInterrupt:
        return 130
    time.sleep(5 * (rank > 0))  # rank 0 speaks for all; the others only where it has nothing to say
    print(f"prime.py: error: {message}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
