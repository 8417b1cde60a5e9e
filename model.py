"""The GPT, and `mix_labels`, the function that this project is about.

Shapes, here and everywhere: B batch, T tokens, S sentences, P slots of the planner, K labels,
C model width, E sentence-vector width, V vocabulary, H heads, D head width.

How this GPT differs from GPT-2:
- Every block can be conditioned on a plan: a linear map of the sentence's plan vector, which starts
  at zero, is added to the attention output before the output projection.
- Rotary positions; no biases except in the norms; no dropout.
- The token embeddings are normalised before the first block, and not tied to the output matrix.
- Each position adds a learned multiple of the previous embedding, channel by channel, after the
  token shift of RWKV, Peng et al., arXiv 2305.13048.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# The README says what each plan is for, and how to add one.
PLANS = (
    "none",
    "fixed",
    "previous",
    "hard",
    "straight_through",
    "gumbel",
    "soft_frozen",
    "soft",
    "oracle",
)
# The next-token loss trains the planner under these plans.
END_TO_END = ("straight_through", "gumbel", "soft")
# These plans need no planner.
NO_PLANNER = ("none", "fixed", "previous", "oracle")


def mix_labels(
    label_logits,
    label_emb,
    plan,
    labels=None,
    previous=None,
    tau=1.0,
    training=False,
):
    """The planner's logits (B, S, K) and the label embeddings (K, C) -> plan vectors (B, S, C).

    labels and previous (B, S) are the true label of each sentence and that of the sentence before
    it, -1 if there is none. Only `oracle` and `previous` look at them. In training, `gumbel` draws
    from torch's global random state at temperature tau. Raises ValueError for `none`.
    Source: "End-to-end Planner Training for Language Modeling", arXiv 2410.12492.
    """
    K = label_emb.shape[0]
    # Weights in float32 even under autocast: in bfloat16 the noise of `gumbel` could be infinite.
    label_logits = label_logits.to(label_emb.dtype)
    probs = label_logits.softmax(-1)                                    # (B, S, K)
    likeliest = one_hot(label_logits.argmax(-1), K)                     # (B, S, K)

    if plan == "fixed":
        # Always label 0: the same parameters, but no information.
        weights = one_hot(torch.zeros_like(probs[..., 0]), K)
    elif plan == "previous":
        # A memory of one label, without prediction.
        weights = one_hot(previous, K)
    elif plan == "hard":
        # The earlier paper. argmax has no gradient.
        weights = likeliest
    elif plan == "straight_through":
        # The bracket is zero, but has the gradient of `soft`.
        weights = likeliest + (probs - probs.detach())
    elif plan == "gumbel":
        # A relaxed random choice in training, the mixture in evaluation.
        weights = F.gumbel_softmax(label_logits, tau) if training else probs
    elif plan == "soft_frozen":
        # The whole distribution, but the planner learns nothing from it.
        weights = probs.detach()
    elif plan == "soft":
        # The method: differentiable in the planner's logits.
        weights = probs
    elif plan == "oracle":
        # The true label: what a perfect planner would give.
        weights = one_hot(labels, K)
    else:
        raise ValueError(f"plan {plan} mixes no labels")

    return weights.to(label_emb.dtype) @ label_emb                      # (B, S, C)


def one_hot(index, K):
    """(B, S) -> (B, S, K): a 1 at each index; a row of zeros for an index of -1."""
    return (index[..., None] == torch.arange(K, device=index.device)).float()


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v for q, k, v (B, H, T, D): causal unless there is a mask
    (B, 1, T, T).
    """
    T = k.shape[2]
    if q.device.type != "cpu" or T > 512:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None
        )
    # torch's fused CPU kernel is made for long windows. At T = 64 it is several times slower than
    # this on some CPUs.
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool).tril()
    scores = q @ k.mT / math.sqrt(q.shape[-1])                          # (B, H, T, T)
    scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v                                       # (B, H, T, D)


def rotary_table(T, D, dtype=torch.float32):
    """cos and sin (2, T, D) of the angles for `rotate`.

    Position t turns the pair of entries (i, i + D/2) by t radians for i = 0 and by less and less
    for the pairs after it. Source: RoPE, Su et al., arXiv 2104.09864.
    """
    # Computed in float64 on the CPU and rounded once; an MPS device has no float64.
    pair = torch.arange(D // 2, dtype=torch.float64)                    # (D/2,)
    frequency = 10_000 ** (-pair / (D // 2))
    angle = torch.arange(T)[:, None] * frequency                        # (T, D/2)
    cos = torch.cat([angle.cos(), angle.cos()], dim=1)                  # (T, D)
    sin = torch.cat([-angle.sin(), angle.sin()], dim=1)
    return torch.stack([cos, sin]).to(dtype)


def rotate(x, rotary):
    """Turn each position of x (B, H, T, D) by its own angles, given as (2, T, D).

    Positions then enter the product of a query and a key only through their distance.
    """
    cos, sin = rotary.to(x.dtype)
    return x * cos + x.roll(x.shape[3] // 2, -1) * sin


class Attention(nn.Module):
    """Causal self-attention, conditioned on a plan if `planned`."""

    def __init__(self, n_embd, n_head, planned=False):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.plan_map = nn.Linear(n_embd, n_embd, bias=False) if planned else None

    def forward(self, x, rotary, plan_vectors=None, plan_index=None, mask=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, H, T, D) each
        y = attend(rotate(q, rotary), rotate(k, rotary), v, mask)
        y = y.transpose(1, 2).reshape(B, T, C)
        if plan_vectors is not None:
            # Map the S plan vectors first and look them up for the T tokens afterwards: S << T.
            mapped = self.plan_map(plan_vectors).flatten(0, 1)          # (B*S, C)
            y = y + F.embedding(plan_index, mapped)                     # (B, T, C)
        return self.proj(y)


class Block(nn.Module):
    """A pre-norm transformer block. The planner's are the same, without a plan."""

    def __init__(self, n_embd, n_head, planned=False):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, n_head, planned)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x, rotary, plan_vectors=None, plan_index=None, mask=None):
        x = x + self.attn(self.ln_1(x), rotary, plan_vectors, plan_index, mask)
        x = x + self.down(F.gelu(self.up(self.ln_2(x))))
        return x


def init_weights(module, n_layer, seed):
    """GPT-2's initialisation: N(0, 0.02^2), divided by sqrt(2 n_layer) where a matrix writes into
    the residual stream. Plan maps start at zero, so that all plans begin with the same loss.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if "plan_map" in name:
            # While the maps are zero, label_emb and the planner have no gradient.
            nn.init.zeros_(p)
        elif p.dim() >= 2:
            writes_residual = name.endswith(("proj.weight", "down.weight"))
            std = 0.02 / math.sqrt(2 * n_layer) if writes_residual else 0.02
            nn.init.normal_(p, std=std, generator=generator)


class GPT(nn.Module):
    """A small GPT. With n_labels > 0 it can be given a plan.

    n_embd must be a multiple of 2 n_head.
    """

    def __init__(
        self, vocab_size, block_size, n_layer, n_head, n_embd, n_labels=0, seed=0
    ):
        super().__init__()
        self.block_size = block_size
        self.vocab_size = vocab_size
        # Matrices whose sides are multiples of 64 are faster on a GPU.
        padded_size = 64 * math.ceil(vocab_size / 64)
        self.wte = nn.Embedding(padded_size, n_embd)
        self.token_shift = nn.Parameter(torch.zeros(n_embd))
        planned = n_labels > 0
        self.blocks = nn.ModuleList(
            Block(n_embd, n_head, planned) for _ in range(n_layer)
        )
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, padded_size, bias=False)
        self.label_emb = (
            nn.Parameter(torch.zeros(n_labels, n_embd)) if planned else None
        )
        rotary = rotary_table(block_size, n_embd // n_head)
        self.register_buffer("rotary", rotary, persistent=False)        # (2, T, D)
        init_weights(self, n_layer, seed)

    def forward(self, tokens, targets=None, plan_vectors=None, sentence_id=None):
        """tokens (B, T), plan_vectors (B, S, C), sentence_id (B, T): the sentence of each target.

        Returns logits (B, T, V) or, given targets (B, T), the loss of each target in nats (B, T);
        targets of -1 give 0. Raises ValueError for more than block_size tokens.
        """
        B, T = tokens.shape
        if T > self.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.block_size}")
        plan_index = None
        if plan_vectors is not None:
            # The index of each position's plan vector among those of all windows, (B*S, C).
            first = plan_vectors.shape[1] * torch.arange(B, device=tokens.device)
            plan_index = first[:, None] + sentence_id                   # (B, T)

        x = self.wte(tokens)                                            # (B, T, C)
        # Normalise: embeddings of size 0.02 would be swamped by the blocks' outputs.
        x = F.layer_norm(x, x.shape[-1:])
        before = F.pad(x[:, :-1], (0, 0, 1, 0))                         # (B, T, C)
        x = x + self.token_shift * before
        rotary = self.rotary[:, :T]
        for block in self.blocks:
            x = block(x, rotary, plan_vectors, plan_index)
        x = self.ln_f(x)                                                # (B, T, C)
        if targets is None:
            return self.logits(x)                                       # (B, T, V)
        return self.loss(x, targets)

    def logits(self, x):
        """(..., C) -> (..., V)."""
        return self.head(x)[..., : self.vocab_size]

    def loss(self, x, targets):
        """x (B, T, C), targets (B, T) -> the loss of each target in nats (B, T)."""
        # A few rows at a time, so that on a CPU their logits stay in its cache.
        n_rows = 256 if x.device.type == "cpu" else 4096
        losses = []
        x_parts = x.flatten(0, 1).split(n_rows)
        target_parts = targets.flatten().split(n_rows)
        for x_part, targets_part in zip(x_parts, target_parts):
            logits = self.logits(x_part)
            losses.append(
                F.cross_entropy(logits, targets_part, ignore_index=-1, reduction="none")
            )
        return torch.cat(losses).view(targets.shape)
