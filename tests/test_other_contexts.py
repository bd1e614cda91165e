"""`opcd.other_contexts`: the shipped tasks can be graded, and hold none of their own answers."""

from opcd.other_contexts import load_other_contexts


def test_every_row_is_a_whole_conversation_with_an_answer() -> None:
    tasks = [task for rows in load_other_contexts().values() for task in rows]
    assert len(tasks) >= 40 and len({task.id for task in tasks}) == len(tasks)
    for task in tasks:
        assert task.messages[0].role == "system" and task.messages[-1].role == "user"
        assert task.answer


def test_no_question_is_one_of_its_worked_examples() -> None:
    """Else a copy of the prompt would count as following it."""
    for rows in load_other_contexts().values():
        shown = {m.content for m in rows[0].messages[:-1]}
        assert not shown & {task.messages[-1].content for task in rows}
