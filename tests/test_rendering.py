"""Conversations become token ids: templates of all kinds, thinking, prompts that do not fit."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opcd.config.training import Rendering
from opcd.errors import OverLongError, RenderingError
from opcd.rendering import Renderer, common_prefix, render_pairs
from opcd.types import Context, Message, Task
from worlds import CHATML, DEFAULT_SYSTEM, NO_SYSTEM, THINKING, tokenizer

TASK = Task("t1", (Message("user", "What is the capital?"),))
CHAT = Task(
    "t2",
    (
        Message("system", "Be kind."),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "What is the capital?"),
    ),
)
RULES = Context(system="Answer with one word.")


def renderer(template: str | None = CHATML, fits: int = 500, **config: Any) -> Renderer:
    return Renderer(tokenizer(template), Rendering(**config), fits)


def sides(found: Renderer, task: Task, context: Context) -> tuple[str, str]:
    pair = found.pair(task, context)
    decode = found.tokenizer.decode
    return decode(list(pair.student_ids)), decode(list(pair.teacher_ids))


@pytest.mark.parametrize("task", [TASK, CHAT])
@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, THINKING])
def test_ids_are_those_of_the_models_own_template(template: str, task: Task) -> None:
    """Token for token what transformers makes of the same conversation."""
    found = renderer(template)
    turns = [{"role": m.role, "content": m.content} for m in task.messages]
    own = found.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(found.pair(task, RULES).student_ids) == own


def test_the_teacher_alone_sees_the_context() -> None:
    student, teacher = sides(renderer(), TASK, RULES)
    user = "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n"
    assert student == user
    assert teacher == "<|im_start|>system\nAnswer with one word.<|im_end|>\n" + user


def test_special_tokens_are_one_id_each() -> None:
    found = renderer()
    ids = found.pair(TASK, RULES).student_ids
    assert ids.count(found.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert ids[0] == found.tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_without_a_context_both_sides_are_alike() -> None:
    pair = renderer().pair(CHAT, Context(), "anchor")
    assert (pair.student_ids, pair.origin, pair.task_id) == (pair.teacher_ids, "anchor", "t2")


def test_a_template_without_a_system_role_gets_it_in_the_first_user_turn() -> None:
    found = renderer(NO_SYSTEM)
    assert not found.has_system_role
    student, teacher = sides(found, CHAT, RULES)
    assert student.startswith("<|im_start|>user\nBe kind.\n\na<|im_end|>")
    assert teacher.startswith("<|im_start|>user\nAnswer with one word.\n\nBe kind.\n\na<|im_end|>")


def test_a_template_that_drops_the_system_message_gets_it_in_the_user_turn() -> None:
    """Some templates do not refuse a system message, they leave it out without a word."""
    silent = CHATML.replace(
        "{{ '<|im_start|>'", "{% if message['role'] != 'system' %}{{ '<|im_start|>'"
    )
    silent = silent.replace("{% endfor %}", "{% endif %}{% endfor %}")
    found = renderer(silent)
    assert not found.has_system_role
    assert "Answer with one word.\n\nWhat is" in sides(found, TASK, RULES)[1]


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, THINKING])
def test_a_system_role_is_recognised(template: str) -> None:
    assert renderer(template).has_system_role


def test_the_preamble_shows_what_the_template_adds() -> None:
    assert renderer(CHATML).preamble == "<|im_start|>user\n"
    assert "You are a helpful assistant." in renderer(DEFAULT_SYSTEM).preamble


def test_a_conversation_the_template_refuses_is_a_rendering_error() -> None:
    strict = "{{ raise_exception('no conversations today') }}"
    with pytest.raises(RenderingError, match="refuses this conversation: no conversations today"):
        renderer(strict).pair(TASK, RULES)


@pytest.mark.parametrize("task", [TASK, CHAT])
def test_a_tokenizer_without_a_template_is_refused(task: Task) -> None:
    with pytest.raises(RenderingError, match=r"has no chat template.*use an instruct model"):
        renderer(None).pair(task, RULES)


# --- thinking


def test_thinking_is_left_to_the_template_where_unset() -> None:
    student, teacher = sides(renderer(THINKING), TASK, RULES)
    assert student.endswith("assistant\n<think>\n\n</think>\n\n")
    assert teacher.endswith("assistant\n<think>\n\n</think>\n\n")


def test_thinking_is_set_for_each_side() -> None:
    found = renderer(THINKING, student_thinking=False, teacher_thinking=True)
    student, teacher = sides(found, TASK, RULES)
    assert student.endswith("</think>\n\n")
    assert teacher.endswith("<think>\n")


@pytest.mark.parametrize("config", [{"teacher_thinking": True}, {"student_thinking": True}])
def test_sides_that_open_differently_by_accident_are_refused(config: dict[str, bool]) -> None:
    with pytest.raises(RenderingError, match=r"Set rendering\.student_thinking and .*, both"):
        renderer(THINKING, **config).pair(TASK, RULES)


def test_a_context_in_the_user_turn_is_no_other_opening() -> None:
    context = Context(user_template="DOCUMENT\n\n{prompt}\n\nOne word.")
    student, teacher = sides(renderer(THINKING), TASK, context)
    assert "DOCUMENT" not in student
    assert "DOCUMENT\n\nWhat is the capital?\n\nOne word.<|im_end|>" in teacher


@pytest.mark.parametrize("prompt", ["assistant", "t", "<|im_end|>", "\n"])
def test_a_prompt_that_occurs_in_the_template_keeps_its_opening(prompt: str) -> None:
    """The opening is what follows the last user turn, not what follows those letters."""
    task = Task("t", (Message("user", f"{prompt} x {prompt}"),))
    sides(renderer(THINKING), task, Context(user_template="DOCUMENT: {prompt}"))


@pytest.mark.parametrize("prompt", ["assistant", "t"])
def test_a_short_prompt_with_a_user_context_is_rendered(prompt: str) -> None:
    task = Task("t", (Message("user", prompt),))
    sides(renderer(), task, Context(user_template="Manual.\n\n{prompt}\n\nOne word."))


# --- length


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_prompt_that_just_fits_is_kept_and_one_more_is_refused(side: str) -> None:
    """Nothing is ever cut."""
    context = RULES if side == "teacher" else Context()
    ids = renderer().pair(TASK, context).teacher_ids
    assert renderer(fits=len(ids)).pair(TASK, context).teacher_ids == ids
    message = rf"row 't1': its {side} prompt has {len(ids)} tokens, but at most {len(ids) - 1} fit"
    with pytest.raises(OverLongError, match=message):
        renderer(fits=len(ids) - 1).pair(TASK, context)


def test_over_long_rows_stop_the_run_unless_dropping_is_asked_for() -> None:
    long = Task("long", (Message("user", "What? " * 50),))
    tasks, contexts = [TASK, long, CHAT], [RULES] * 3
    with pytest.raises(OverLongError, match="row 'long'"):
        render_pairs(renderer(fits=120), tasks, contexts)
    pairs, dropped = render_pairs(renderer(fits=120, over_long="drop_row"), tasks, contexts)
    assert ([p.task_id for p in pairs], dropped) == (["t1", "t2"], ["long"])


def test_dropping_every_row_is_an_error() -> None:
    with pytest.raises(OverLongError, match="all 1 rows are longer than 5 tokens"):
        render_pairs(renderer(fits=5, over_long="drop_row"), [TASK], [RULES])


def test_only_length_drops_a_row() -> None:
    with pytest.raises(RenderingError, match="no chat template"):
        render_pairs(renderer(None, over_long="drop_row"), [TASK], [RULES])


# --- decoding and prefixes


@given(st.text(max_size=40))
def test_a_response_is_decoded_to_the_text_it_was(text: str) -> None:
    found = RENDERER
    end = found.tokenizer.eos_token_id
    ids = [*found.tokenizer.encode(text, add_special_tokens=False), end]
    if not any(special in text for special in found.tokenizer.all_special_tokens):
        assert found.decode(ids) == text.strip()


RENDERER = renderer()

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=6)


@given(SEQUENCES)
def test_common_prefix_is_the_brute_force_one(sequences: list[list[int]]) -> None:
    """The last token of the shortest never counts: its logits predict the response."""
    shared = 0
    while sequences and all(len(s) > shared + 1 for s in sequences):
        if len({s[shared] for s in sequences}) > 1:
            break
        shared += 1
    assert common_prefix([tuple(s) for s in sequences]) == shared


def test_common_prefix_of_one_sequence_leaves_its_last_token() -> None:
    assert common_prefix([(5, 6, 7)]) == 2
