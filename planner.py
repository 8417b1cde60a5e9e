"""The planner predicts the label of the next sentence; `PlannedGPT` gives the GPT its plan.

NOTE(paper): the paper's planner reads the sentences with a pretrained encoder. Ours reads the
vectors of labels.py, so that everything is trained from scratch.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from model import (
    END_TO_END,
    GPT,
    NO_PLANNER,
    Block,
    init_weights,
    mix_labels,
    rotary_table,
)


class Planner(nn.Module):
    """A causal transformer over sentence vectors.

    Slot j predicts the label of sentence j from the vectors of the sentences before it.
    """

    def __init__(self, n_vector, n_labels, n_layer, n_head, n_embd, n_slots, seed=0):
        super().__init__()
        self.inp = nn.Linear(n_vector, n_embd, bias=False)
        # Used where there is no previous sentence.
        self.start = nn.Parameter(torch.zeros(n_embd))
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, n_labels, bias=False)
        rotary = rotary_table(n_slots, n_embd // n_head)
        self.register_buffer("rotary", rotary, persistent=False)        # (2, n_slots, D)
        init_weights(self, n_layer, seed)

    def forward(self, vectors, opening):
        """Unit vectors (B, P, E), opening (B, P) -> label logits (B, P, K).

        The logits of slot j depend on the vectors i with opening[j] <= i < j. P is at most n_slots.
        """
        B, P, E = vectors.shape
        # Vectors come in half precision; their entries are scaled to a size of about one.
        x = self.inp(vectors.to(self.start.dtype) * E**0.5)             # (B, P, C)
        # Slot j holds the vector of sentence j - 1, or `start` if that is out of its view.
        slots = torch.arange(P, device=x.device)
        sees_none = (slots <= opening)[:, :, None]                      # (B, P, 1)
        x = torch.where(sees_none, self.start.to(x.dtype), x.roll(1, dims=1))
        # Slot j attends to the slots after its opening, and to itself.
        in_view = slots > opening[:, :, None]                           # (B, P, P)
        itself = torch.eye(P, dtype=torch.bool, device=x.device)
        mask = (in_view.tril() | itself)[:, None]                       # (B, 1, P, P)
        rotary = self.rotary[:, :P]
        for block in self.blocks:
            x = block(x, rotary, mask=mask)
        return self.head(self.ln_f(x))                                  # (B, P, K)


def label_loss(label_logits, labels):
    """Cross-entropy in nats of logits (B, S, K) against labels (B, S); -1 does not count."""
    return F.cross_entropy(
        label_logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-1
    )


class PlannedGPT(nn.Module):
    """A GPT under one of the plans, with a planner if the plan needs one.

    reach and view_tokens say which sentences the planner may read (see data.window_batch).
    """

    def __init__(self, gpt, planner, plan, reach, view_tokens):
        super().__init__()
        self.gpt = gpt
        self.planner = None if plan in NO_PLANNER else planner
        self.plan = plan
        self.reach = reach
        self.view_tokens = view_tokens
        if self.planner is not None and plan not in END_TO_END:
            # No optimizer trains it, and DDP would wait for its gradients.
            self.planner.requires_grad_(False)

    def batch(self, corpus, starts):
        """The windows from `starts` (B,), with all that this model reads."""
        return data.window_batch(
            corpus, starts, self.gpt.block_size, self.reach, self.view_tokens
        )

    def plan_vectors(self, batch):
        """Plan vectors (B, S, C) and the planner's logits (B, S, K); None and None under `none`."""
        if self.plan == "none":
            return None, None
        label_emb = self.gpt.label_emb
        B, S = batch.labels.shape
        if self.planner is None:
            # These plans ignore the logits.
            label_logits = label_emb.new_zeros(B, S, len(label_emb))
        else:
            label_logits = self.planner(batch.vectors, batch.opening)[:, -S:]
        plan_vectors = mix_labels(
            label_logits,
            label_emb,
            self.plan,
            batch.labels,
            batch.previous,
            training=self.training,
        )
        return plan_vectors, label_logits

    def forward(self, batch):
        """The loss of each target in nats (B, T), and label logits (B, S, K) or None."""
        plan_vectors, label_logits = self.plan_vectors(batch)
        # Under an END_TO_END plan the mean nll has a gradient to the planner, by plan_vectors.
        nll = self.gpt(batch.tokens, batch.targets, plan_vectors, batch.sentence_id)
        return nll, label_logits


def build_model(config, plan, vocab_size):
    """An untrained model with the sizes in train.Config or in a run's config.json."""
    c = config
    n_labels = 0 if plan == "none" else c.n_labels
    gpt = GPT(vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd, n_labels, c.seed)
    # Enough for a window with the sentences before it, and for the spans of stage planner.
    n_slots = c.block_size + 2 * c.planner_reach + 16
    # Sentence vectors are means of token embeddings, so E = C.
    planner = Planner(
        c.n_embd, c.n_labels, c.planner_layer, c.n_head, c.planner_embd, n_slots, c.seed
    )
    view_tokens = c.block_size if c.planner_view == "equal" else None
    return PlannedGPT(gpt, planner, plan, c.planner_reach, view_tokens)
