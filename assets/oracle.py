"""prime.py with an oracle in place of the implicit PRM: `python assets/oracle.py [options of prime.py]`, on the miniature.

The process reward is -1 on the first token of a response that departs from the right solution and 0 on every other. What
this gains over `--reward outcome`, at one weight and learning rate, is the headroom that README shows.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from transformers import AutoTokenizer

import prime

def oracle_rewards(batch: prime.Batch, tokenizer) -> torch.Tensor:
    """(B, T) process rewards of responses to chains of operations."""
    rewards = torch.zeros_like(batch.mask)
    for row, tokens, length in zip(rewards, batch.tokens, batch.prompt_lengths):
        response = prime.miniature_response(prime.miniature_solution(tokenizer.decode(tokens[:length])))
        right = tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
        wrong = [t for t, pair in enumerate(zip(tokens[length:].tolist(), right)) if pair[0] != pair[1]]
        if wrong:
            row[wrong[0]] = -1.0
    return rewards

def main() -> int:
    """Run prime.py with a policy alone, rewarded by the oracle."""
    tokenizer = []

    def load_models(name, cfg):
        tokenizer.append(AutoTokenizer.from_pretrained(name))
        return prime.Models(prime.Learner(prime.load_model(name, cfg), cfg.lr, cfg.weight_decay, cfg.grad_clip))

    prime.load_models = load_models
    prime.score_and_update_prm = lambda prm, ref_logps, batch, cfg: (oracle_rewards(batch, tokenizer[0]), {})
    return prime.main()

if __name__ == "__main__":
    sys.exit(main())
