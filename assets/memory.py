"""Memory per GPU of `prime.py`, in GB of 10^9 bytes, by the formula in README: `python assets/memory.py` prints its table."""

LOGIT_CHUNK = 1024  # as in prime.py

# parameters, layers L, hidden size d, key and value size kv, inner size of the MLP f, vocabulary V, tied embeddings
QWEN2_5 = {"0.5B": (0.494e9, 24, 896, 128, 4864, 151936, True),
           "1.5B": (1.544e9, 28, 1536, 256, 8960, 151936, True),
           "7B": (7.616e9, 28, 3584, 512, 18944, 152064, False)}

def state_bytes(trained: bool) -> int:
    """Bytes a parameter: float32 weight, gradient and two Adam moments; a frozen model's bfloat16 weight."""
    return 4 + 4 + 8 if trained else 2

def activation_bytes(layers: int, hidden: int, kv: int, inner: int, checkpointing: bool, heads: int = 0) -> int:
    """Bytes a token that a bfloat16 forward pass keeps for its backward pass."""
    block = 20 * hidden + 4 * kv + 8 * inner + 4 * (heads + 2)
    return 6 * hidden + (2 * hidden * layers + block if checkpointing else block * layers)

def gigabytes(size: str, gpus: int, tokens: int, checkpointing=False, offload=False, policy_reference=False) -> float:
    """What PyTorch holds on a GPU at the peak of a PRM or policy update with micro-batches of so many tokens."""
    parameters, layers, hidden, kv, inner, vocabulary, tied = QWEN2_5[size]
    reference = 0 if policy_reference else state_bytes(False)
    states = parameters / gpus * (2 * state_bytes(True) - 4 + reference)  # only the model in its update has gradients
    embeddings = vocabulary * hidden * (1 if tied else 2)
    block = (parameters - embeddings) / layers
    gathered = 2 * (embeddings + 2 * block) + 2 * (embeddings + block)  # bfloat16 weights of two blocks, gradients of one
    logits = 3 * 4 * LOGIT_CHUNK * vocabulary
    activations = tokens * activation_bytes(layers, hidden, kv, inner, checkpointing)
    reducing = embeddings * (2 + 2 + 4 + 4 / gpus)  # last, without activations: their gradients are summed in float32
    return ((0 if offload else states) + max(gathered + logits + activations, reducing)) / 1e9

if __name__ == "__main__":
    print("| model | GPUs | as it is | `--activation-checkpointing` | `--cpu-offload` | `--prm-ref policy` | all three "
          "| `--vllm-memory` on 80 GB, up to |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for model, count in (("0.5B", 1), ("1.5B", 1), ("1.5B", 2), ("7B", 4), ("7B", 8)):
        cells = [gigabytes(model, count, 4096, *options) for options in (
            (), (True,), (False, True), (False, False, True), (True, True, True))]
        awake = 80 - 4 - QWEN2_5[model][0] / count * (2 * 12 + 2) / 1e9  # beside weights, Adam, the reference and 4 GB of CUDA
        print(f"| {model} | {count} | " + " | ".join(f"{cell:.0f}" for cell in cells) + f" | {awake / 80:.2f} |")
