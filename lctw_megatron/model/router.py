"""Which experts a token goes to, how evenly, and what uneven routing costs.

The objective of a step over the sequences q of its global batch, a live target i having the weight
w_i and the loss l_i, is

    1/N [ sum_i w_i l_i  +  c sum_layers sum_q n_q L_q ]        L_q = E sum_e f_qe p_qe

with N live targets, n_q of them in q, E experts, c `model.moe_aux_loss_coeff`; f_qe the share of
q's choices (k for each live position) that fell on expert e and p_qe the mean probability that the
router gave e there. L_q is 1 where routing is even (Fedus et al. 2021, "Switch Transformers",
section 2.2, and for each sequence by itself DeepSeek-AI 2024, "DeepSeek-V3", section 2.1.2). So the
second part is a mean over targets that all count once, whatever their weights; positions without a
target (padding) do not count. It is taken by sequence, so neither the layout nor the micro batch
changes it.

Every rank adds c E sum_q sum_e f_qe sum_t p_te over its own positions t of q: n_q p_qe is a sum
over positions, f_qe is counted over all ranks that share q (TP under sequence parallelism, CP) and
carries no gradient. The gradients are summed over those ranks and the data-parallel ones, and
divided once by N like those of the losses.

megatron-core's own auxiliary loss is not used: it counts padding, its value depends on what is in a
micro batch, and with calculate_per_token_loss it is multiplied with the tokens of a rank where
those of the micro batch belong, and so comes out TP x CP times too small.

Nothing is dropped: an expert takes all tokens that choose it. Which experts have the largest
probabilities is exact but for rounding; two that are closer than that may change places between
layouts, as between any two programs that add up in another order.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctw_megatron.platform.cpu import patch_megatron

patch_megatron()  # before the class below is derived from megatron-core's

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

from lctw_megatron.config.schema import ModelConfig  # noqa: E402


class SequenceBalancedRouter(TopKRouter):
    """megatron-core's router with the choice, the balance and the counts of this file."""

    coefficient: float
    is_normalised: bool
    """Whether the probabilities of the chosen experts are scaled to sum 1."""
    choices: Tensor
    """float64 [E]: how many live positions of this rank chose each expert."""
    imbalance: Tensor
    """float64: this rank's part of sum_q n_q L_q."""

    def gating(self, input: Tensor) -> Tensor:
        """Logits [s, b, E] of input [s, b, h], in float32 at least: which expert is chosen must not
        hang on the 8 bits of bfloat16. megatron-core's own needs TransformerEngine (0.16)."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [s, b, E]; padding_mask [s, b], True where there is no target, or of all tensor
        ranks' positions. Returns each expert's weight [s b, E], 0 if it was not chosen, and bool
        [s b, E] which were."""
        scores = logits.softmax(-1)
        weights, chosen = scores.topk(self.topk, dim=-1)
        if self.is_normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        takes = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
        probabilities = torch.zeros_like(scores).scatter(-1, chosen, weights)
        # Neither while windows, validation and recall are run nor in the forward that recomputation
        # repeats with gradients.
        if self.training and torch.is_grad_enabled():
            probabilities = self._balance(probabilities, scores, takes, padding_mask)
        experts = logits.shape[-1]
        return probabilities.view(-1, experts), takes.view(-1, experts)

    def _balance(
        self, probabilities: Tensor, scores: Tensor, takes: Tensor, padding_mask: Tensor | None
    ) -> Tensor:
        """``probabilities`` whose backward adds the gradient of the balance; counts the choices."""
        if padding_mask is not None:
            if len(padding_mask) != len(scores):  # whole on stages after the first (0.16, 0.19)
                group = self.tp_group
                padding_mask = padding_mask.chunk(group.size())[group.rank()]
            live = ~padding_mask.unsqueeze(-1)
            takes, scores = takes & live, scores * live
        counts = takes.sum(0).to(scores.dtype)  # [b, E]
        whole = counts.clone()
        dist.all_reduce(whole, group=self.tp_cp_group)
        shares = whole / whole.sum(-1, keepdim=True).clamp(min=1)
        part = scores.shape[-1] * (shares * scores.sum(0)).sum()
        self.choices += counts.sum(0)
        self.imbalance += part.detach()
        return MoEAuxLossAutoScaler.apply(probabilities, self.coefficient * part)


def routers(chunks: list[Any]) -> Iterator[SequenceBalancedRouter]:
    for chunk in chunks:
        yield from (m for m in chunk.modules() if isinstance(m, SequenceBalancedRouter))


def balance_routers(chunk: Any, model: ModelConfig) -> None:
    """Put the routers of this file in the place of megatron-core's, whose parameters they keep."""
    for router in chunk.modules():
        if isinstance(router, TopKRouter):
            router.__class__ = SequenceBalancedRouter
            router.coefficient = model.moe_aux_loss_coeff
            router.is_normalised = model.norm_topk_prob
            device = router.weight.device
            router.choices = torch.zeros(router.num_experts, dtype=torch.float64, device=device)
            router.imbalance = torch.zeros((), dtype=torch.float64, device=device)


def take_counts(chunks: list[Any], model: ModelConfig, device: torch.device) -> Tensor:
    """float64 [layers, E + 1] of this rank since the last call: the choices of every expert, and
    the part of sum_q n_q L_q. [0, 1] of a dense model."""
    if not model.num_moe_experts:
        return torch.zeros((0, 1), dtype=torch.float64, device=device)
    shape = model.num_layers, model.num_moe_experts + 1
    found = torch.zeros(shape, dtype=torch.float64, device=device)
    for router in routers(chunks):
        assert router.layer_number is not None
        # HybridModel counts attention, too.
        layer = (router.layer_number - 1) * model.num_layers // router.config.num_layers
        found[layer] = torch.cat([router.choices, router.imbalance.view(1)])
        router.choices.zero_()
        router.imbalance.zero_()
    return found
