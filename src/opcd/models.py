"""Hidden states, output head, and the one forward pass that is trained.

Knows how to get hidden states and logits out of any transformers causal model; knows nothing of
prompts, teachers' kinds or optimisers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import DynamicCache

from opcd.adapters import causal_model, in_shards
from opcd.attention import attend_by, keeping_in, rounding_of, why_no_prefix
from opcd.batching import WIDTH_STEP, Batch, Side
from opcd.chunking import Head, TeacherScore, stats_against
from opcd.config.training import Loss
from opcd.divergence import TokenStats
from opcd.errors import ModelError
from opcd.products import can_pack, frozen_product, pack
from opcd.ragged import Layout, lay_out

T = TypeVar("T")

PROBES = (
    "The quick brown fox, 1,234.50 EUR - naïve café?\n",
    '{"mood": "glad", "n": [1, 2, 3]}',
    "def f(x):\n\treturn x ** 2  # comment",
    "你好, Привет, مرحبا 🙂",
)
"""Texts whose token ids tell two vocabularies apart."""


MIN_SAVED_TOKENS = 64
"""An opening that rows share is read apart if that many tokens need not be read again."""
HEAD_ROWS = 64
"""Rows that a head's products are packed for; it is as fast for others."""
PLAIN_ATTENTION_TOKENS = 512
"""Up to this length a CPU trains with plain attention, whose scores grow with its square."""
DROPOUTS = ("attention_dropout", "attn_pdrop")
"""What families call the share of attention that they drop in training."""


class Distiller(nn.Module):
    """What accelerate prepares: the student, with the whole divergence inside its `forward`.

    Under FSDP the parameters are whole only inside the wrapped module's `forward`, so the chunks
    and the head have to run there.
    """

    def __init__(self, student: Any) -> None:
        """Wrap the model in training."""
        super().__init__()
        self.student = student

    def forward(self, batch: Batch, teacher: TeacherScore, loss: Loss) -> TokenStats:
        """Statistics of each response token, `divergence_T` with its gradient."""
        with _lora_inputs_uncast(self.student):
            student_TD = hidden_states(self.student, batch.student)
        own_head = output_head(self.student)
        return stats_against(student_TD, own_head, teacher, batch.response_T, loss)

    def run(self, work: Callable[[], T]) -> T:
        """Do other work with the student where its parameters are as whole as in `forward`."""
        return work()


def hidden_states(model: Any, side: Side) -> Tensor:
    """The hidden states that predict the response tokens, `hidden_TD`; no head is run.

    An opening that all rows share, such as a chat template's own system message, is read once for
    all of them, and gets its gradient from all of them (`prefix_cache` has none to give). On a CPU
    short rows are read one after the other, without padding.
    """
    if can_be_ragged(model, side.ids_BS):
        layout = lay_out(side.rows(), side.ids_BS.device)
        return read_as_one(model, side, layout, ("opcd_ragged", {"layout": layout}))
    decoder = causal_model(model).get_decoder()
    on_cpu, length = side.ids_BS.device.type == "cpu", side.ids_BS.shape[1]
    recomputed = getattr(decoder, "gradient_checkpointing", False)
    # The CPU's fused attention takes 4 x as long as plain products to differentiate in bfloat16.
    # Checkpointed layers run again in the backward pass, when the choice has been taken back.
    short = length <= PLAIN_ATTENTION_TOKENS
    plain = on_cpu and torch.is_grad_enabled() and short and not recomputed
    # Families that look at the name themselves may compute something else by another one.
    plain = plain and getattr(causal_model(model), "_supports_attention_backend", False)
    # Weights in shards are put together once a pass, by all processes alike, whatever they read.
    once = recomputed or why_no_prefix(model) or in_shards(model)
    shared = 0 if once else shared_opening(side)
    with attend_by(model, "eager") if plain else nullcontext():
        if not shared:
            return side.take(decoder(input_ids=side.ids_BS, use_cache=False).last_hidden_state)
        cache = DynamicCache(config=causal_model(model).config)
        kept = keeping_in(cache, decoder)
        decoder(input_ids=side.ids_BS[:1, :shared], **kept)
        cache.batch_repeat_interleave(len(side.ids_BS))
        rest_BS = side.ids_BS[:, shared:]
        hidden_BSD = decoder(input_ids=rest_BS, **kept).last_hidden_state
    return hidden_BSD[side.row_T, side.column_T - shared]


def can_be_ragged(model: Any, ids_BS: Tensor) -> bool:
    """Whether a batch of rows is read as one sequence: short rows, on a CPU, by plain attention.

    A GPU's fused attention is worth more than the padding; long rows have too many scores.
    """
    config = causal_model(model).config.get_text_config()
    return (
        ids_BS.device.type == "cpu"
        and ids_BS.shape[1] <= PLAIN_ATTENTION_TOKENS
        and not getattr(causal_model(model).get_decoder(), "gradient_checkpointing", False)
        and not any(getattr(config, name, 0.0) for name in DROPOUTS)
        and not why_no_prefix(model)
    )


def read_as_one(
    model: Any,
    side: Side,
    layout: Layout,
    attends: tuple[str, dict[str, Any]],
    before: Sequence[int] = (),
) -> Tensor:
    """The hidden states that predict the response tokens, `hidden_TD`, of rows in one sequence.

    Args:
        model: whose weights read.
        side: the rows.
        layout: where they stand in the sequence.
        attends: the attention function, by its name with transformers, and what it is told.
        before: how many tokens each row has in front of it; default: none.
    """
    name, told = attends
    with attend_by(model, name):
        read = causal_model(model).get_decoder()(
            input_ids=layout.ids_1T,
            position_ids=layout.positions(before),
            use_cache=False,
            **told,
        )
    return read.last_hidden_state[0, layout.places(side.row_T, side.column_T)]


def shared_opening(side: Side) -> int:
    """How many tokens at the head of all rows are the same and predict no response token.

    In steps of `WIDTH_STEP`, so that widths stay few; 0 where it would not pay.
    """
    same_S = (side.ids_BS == side.ids_BS[:1]).all(0)
    same = min(int(same_S.long().cumprod(0).sum()), int(side.column_T.min()))
    same -= same % WIDTH_STEP
    return same if same * (len(side.ids_BS) - 1) >= MIN_SAVED_TOKENS else 0


def output_head(model: Any) -> Head:
    """A model's map from hidden states to logits, with the scaling its family applies.

    Logits are float32 whatever the model's dtype: bfloat16 knows a logit of 20 to 0.125, so that
    likely tokens tie and greedy answers turn on the order of the vocabulary.
    """
    model = causal_model(model)
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden_CD: Tensor) -> Tensor:
        logits_CV = _precise_linear(linear, hidden_CD)
        logits_CV = logits_CV if scale == 1.0 else logits_CV * scale
        return logits_CV if cap is None else torch.tanh(logits_CV / cap) * cap

    return head


def _precise_linear(linear: Any, hidden_CD: Tensor) -> Tensor:
    if type(linear) is not nn.Linear:  # adapted or quantised: its own forward knows how
        logits_CV = linear(hidden_CD.to(linear.weight.dtype))
        return logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    weight, bias = _precise(linear.weight), linear.bias
    with torch.autocast(hidden_CD.device.type, enabled=False):
        bias = None if bias is None else bias.to(weight.dtype)
        hidden_CD = hidden_CD.to(weight.dtype)
        if weight.requires_grad:
            return functional.linear(hidden_CD, weight, bias)
        return frozen_product(hidden_CD, weight, bias, linear.weight)


_PRECISE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _precise(weight: Tensor) -> Tensor:
    """The weight in float32 at least; kept while it does not move, since it is used so often.

    What is kept is packed where that can be: nothing but products is done with it.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype == dtype or weight.requires_grad:
        return weight.to(dtype)
    if weight not in _PRECISE or _PRECISE[weight][0] != weight._version:
        precise = weight.detach().to(dtype)
        kept = pack(precise, HEAD_ROWS) if can_pack(precise) else precise
        _PRECISE[weight] = (weight._version, kept)
    return _PRECISE[weight][1]


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare `output_head` on hidden states with the model's own logits.

    Raises:
        ModelError: they differ, so this model's head does something that is not known here.
    """
    device = next(model.parameters()).device
    ids_BS = torch.arange(4, device=device).unsqueeze(0)
    hidden_TD = causal_model(model).get_decoder()(input_ids=ids_BS).last_hidden_state[0]
    own_TV = causal_model(model)(input_ids=ids_BS).logits[0].float()
    if not torch.allclose(output_head(model)(hidden_TD), own_TV, rtol=1e-2, atol=1e-2):
        raise ModelError(
            f"the logits of {type(causal_model(model)).__name__} are not its head applied to its "
            "hidden states, so its divergence cannot be computed in chunks; use another model"
        )


@torch.no_grad()
def check_rows(model: Any) -> None:
    """Compare a row alone with the same row in a batch: before other tokens, and behind padding.

    Raises:
        ModelError: it is not read alike, so that answers would depend on what they stand beside.
    """
    decoder, device = causal_model(model).get_decoder(), next(model.parameters()).device
    ids_1S = torch.tensor([[1, 2, 3, 4, 5]], device=device)
    padded_1S = functional.pad(ids_1S[:, :3], (2, 0))
    told = {"attention_mask": (padded_1S > 0).long(), "position_ids": (ids_1S - 3).clamp(min=0)}
    alone_SD = decoder(input_ids=ids_1S[:, :3], use_cache=False).last_hidden_state[0]
    before_SD = decoder(input_ids=ids_1S, use_cache=False).last_hidden_state[0, :3]
    behind_SD = decoder(input_ids=padded_1S, use_cache=False, **told).last_hidden_state[0, 2:]
    for place, found_SD in (("before other tokens", before_SD), ("behind padding", behind_SD)):
        apart = (found_SD - alone_SD).norm() / alone_SD.norm()
        if not apart <= 2 * rounding_of(model):
            raise ModelError(
                f"{type(causal_model(model)).__name__} does not read a row {place} as it reads it "
                f"alone ({apart:.0%} apart), so batches would change its answers; use another model"
            )


def check_same_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Compare what two tokenizers make of probe texts; sizes alone tell nothing.

    Raises:
        ModelError: some text has other ids.
    """
    specials = [str(token) for token in student_tokenizer.all_special_tokens]
    for text in (*PROBES, *specials):
        ours, theirs = (
            tokenizer.encode(text, add_special_tokens=False)
            for tokenizer in (student_tokenizer, teacher_tokenizer)
        )
        if ours != theirs:
            raise ModelError(
                f"student and teacher have different vocabularies: {text!r} is {ours[:6]} for "
                f"the one and {theirs[:6]} for the other, so the teacher would score other words. "
                "Set teacher.path to a model of the student's family"
            )


@contextmanager
def _lora_inputs_uncast(model: Any) -> Iterator[None]:
    # Under autocast PEFT would turn every activation to float32 only to have it cast back.
    autocast = torch.is_autocast_enabled(next(model.parameters()).device.type)
    with disable_input_dtype_casting(model, active=autocast):
        yield
