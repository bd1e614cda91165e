"""Worlds of the lab: each is a hidden truth, told by a context or found out by trying.

    code_book   a value for every key
    rulebook    a desk for every product and an urgency for every tone, in messages
    lake        what the symbols on a frozen lake stand for

A world is an ordinary run: files and a configuration, for the programs that train real models.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal

from opcd.config import Run
from opcd.lab import documents
from opcd.lab import language as words
from opcd.lab.minds import LAKE, MINDS, mind_folder, train_lakes
from opcd.runs import write_text

WorldName = Literal["code_book", "rulebook", "lake"]
OTHERS = 12
"""Other truths of the same kind, for anchors; as many again to measure on."""
ROWS = {"test": 144, "validation": 144, "extraction": 96, "train": 256}
"""Of each split, where a world has rows and not boards."""
BESIDES = 16
"""Facts about other things on the page that tells of a lake, among which the model has to find the
three that matter: a context that is long for what it is needed for, as real ones are."""
READERS: dict[WorldName, str] = {"code_book": "large", "rulebook": "middle", "lake": "large"}
"""Whose world it is. The large model reads a rulebook from its prompt without a mistake, the middle
one half of its messages: the imperfect context that some claims are about."""


@dataclass(frozen=True, slots=True)
class World:
    """A truth, and the files that tell it and ask about it."""

    name: WorldName
    seed: int
    folder: Path
    facts: Mapping[str, str]

    @property
    def context(self) -> Path:
        """All the facts, as a context; those of a lake among others."""
        return self.folder / "facts.md"


def make_world(name: WorldName, seed: int, folder: Path) -> World:
    """Draw a world and write its files: facts, rows of each split, anchors, and instructions."""
    facts = truth(name, Random(f"{name}/{seed}"))
    world = World(name, seed, folder.resolve() / f"{name}-{seed}", facts)
    world.folder.mkdir(parents=True, exist_ok=True)
    write_text(world.context, tell(page_of(world)))
    for split, rows in splits(world).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(world.folder / f"{split}.jsonl", lines)
    write_text(world.folder / "anchors.json", json.dumps(anchors(world)))
    (world.folder / "instructions").mkdir(exist_ok=True)
    asked = f"### user\n{{trace}}\n\n{{feedback}}\n\n{{previous}}\n\n{words.LESSONS}\n"
    write_text(world.folder / "instructions" / "extract.md", asked)
    return world


def truth(name: WorldName, random: Random) -> dict[str, str]:
    """The facts of a world."""
    match name:
        case "code_book":
            return documents.draw_book(random)
        case "rulebook":
            return documents.draw_rules(random)
        case "lake":
            symbols = documents.draw_symbols(random)
            return {symbols[role]: role for role in words.ROLES}


def tell(facts: Mapping[str, str]) -> str:
    """Facts as the lines of a context."""
    return "".join(f"- {name} is {value}\n" for name, value in facts.items())


def page_of(world: World) -> dict[str, str]:
    """What the context of a world tells: its facts, those of a lake somewhere on a longer page."""
    if world.name != "lake":
        return dict(world.facts)
    random = Random(f"page/{world.seed}")
    other = documents.draw_book(random) | documents.draw_rules(random)
    page = {name: other[name] for name in random.sample(list(other), BESIDES)} | dict(world.facts)
    return {name: page[name] for name in random.sample(list(page), len(page))}


def answer_of(facts: Mapping[str, str], prompt: str) -> str:
    """The right answer to a question: what is known of its words, the key or product first."""
    named = [word for word in prompt.split() if word in facts]
    return " ".join(facts[word] for word in sorted(named, key=list(facts).index))


def prompts_of(name: WorldName, random: Random) -> Iterator[str]:
    """Questions of a world, over and over."""
    while True:
        if name == "code_book":
            order = random.sample(words.KEYS, len(words.KEYS))
            yield from (documents.question(key, random) for key in order)
        else:
            product, tone = random.choice(words.PRODUCTS), random.choice(words.TONES)
            yield documents.message(product, tone, random)


def splits(world: World) -> dict[str, list[dict[str, str]]]:
    """Rows of each split; no prompt is in two of them. A lake has boards in their place."""
    if world.name == "lake":
        return {}
    prompts, seen = prompts_of(world.name, Random(f"rows/{world.seed}")), set[str]()
    found: dict[str, list[dict[str, str]]] = {}
    for split, count in ROWS.items():
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            prompt = next(prompts)
            if prompt not in seen:
                seen.add(prompt)
                rows.append({"prompt": prompt, "answer": answer_of(world.facts, prompt)})
        found[split] = rows
    return found


def other_truths(name: WorldName, seed: int, split: str) -> list[dict[str, str]]:
    """Truths of a kind that are not that of the world of this seed."""
    random = Random(f"{split}/{name}/{seed}")
    return [truth(name, random) for _ in range(OTHERS)]


def anchors(world: World) -> dict[str, Any]:
    """Other truths as system messages, with questions of their kind."""
    found: dict[str, Any] = {}
    for split in ("train", "test"):
        random = Random(f"anchors/{split}/{world.seed}")
        drawn = lake_prompts(random) if world.name == "lake" else prompts_of(world.name, random)
        # The split's name is no word of the language: it keeps the two apart for people.
        asked = [f"{prompt} {split}" for prompt in islice(drawn, 48)]
        found[split] = {
            "systems": [tell(facts) for facts in other_truths(world.name, world.seed, split)],
            "prompts": list(dict.fromkeys(asked)),
        }
    return found


def lake_prompts(random: Random) -> Iterator[str]:
    """First turns on lakes, in any symbols."""
    lakes = train_lakes()
    while True:
        yield documents.board_text(random.choice(lakes), 0, documents.draw_symbols(random))


def run_of(world: World, **changes: Any) -> Run:
    """The world as a run that bakes its facts in; tables of `changes` are laid over it."""
    tree: dict[str, Any] = {
        "name": f"{world.name}-{world.seed}",
        "seed": world.seed,
        "out": world.folder / "runs",
        "model": {
            "path": str(mind_folder(MINDS[READERS[world.name]])),
            "dtype": "float32",
            "device": "cpu",
            "tuning": {"type": "full"},
        },
        "context": {"type": "system_prompt", "path": world.context},
        "teacher": {"type": "frozen"},
        "rollout": {"max_new_tokens": 4},
        "anchor": {"share": 0.0, "path": world.folder / "anchors.json", "max_new_tokens": 4},
        "optimizer": {"lr": 5e-4},
        "batch": {"prompts_per_step": 16, "rows_per_forward": 128},
        # By default the last step is measured, and nothing is chosen.
        "evaluation": {"every_steps": 10_000, "validation_rows": None},
        "steps": 60,
    }
    if world.name == "lake":
        symbols = {role: symbol for symbol, role in world.facts.items()}
        game = LAKE.model_dump(mode="json")
        tree["game"] = game | {"symbols": {"player": words.PLAYER, **symbols}}
    else:
        rows = {split: world.folder / f"{split}.jsonl" for split in ("train", "validation", "test")}
        tree |= {"tasks": rows, "grader": {"type": "exact"}}
    for key, value in changes.items():
        tree[key] = _over(tree.get(key, {}), value) if isinstance(value, dict) else value
    return Run.model_validate(tree)


def _over(table: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A table with changes; one of another type keeps nothing, least of all the facts' path."""
    kept = table if change.get("type", table.get("type")) == table.get("type") else {}
    return {**kept, **change}
