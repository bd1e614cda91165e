"""The other side: TRL's `SDFTTrainer`, driven over standard input (see `workload`).

    .venv-trl/bin/python benchmarks/side_sdft.py FOLDER < commands

Runs where trl 1.16.0 is installed and opcd is not. What would slow SDFT down without being part of
the method is off: gradient checkpointing, the importance ratio, logging.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import workload
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.sdft import (  # pyright: ignore[reportMissingImports]
    SDFTConfig,
    SDFTTrainer,
)


class TimedTrainer(SDFTTrainer):
    """SDFT's trainer with a clock beside its generation and its teacher's pass."""

    rollout_s = 0.0
    teacher_s = 0.0

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        started = time.perf_counter()
        found = super()._prepare_inputs(generation_batch)
        self.rollout_s += time.perf_counter() - started
        return found

    def _forward_logits(self, *arguments: Any, **named: Any) -> torch.Tensor:
        started = time.perf_counter()
        found = super()._forward_logits(*arguments, **named)
        if not torch.is_grad_enabled():
            self.teacher_s += time.perf_counter() - started
        return found


class Driver(TrainerCallback):
    """Waits for the word before each step, and answers after it."""

    def __init__(self, trainer: TimedTrainer) -> None:
        """Note whose clocks to read."""
        self.trainer = trainer
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for a step to be asked for."""
        if not workload.wait_for_step():
            workload.answer(read_context_s=0.0)
            sys.exit(0)
        self.trainer.rollout_s = self.trainer.teacher_s = 0.0
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell how long the step took."""
        wall_s = time.perf_counter() - self.started
        rollout_s, teacher_s = self.trainer.rollout_s, self.trainer.teacher_s
        inputs = self.trainer._buffered_inputs
        assert inputs, "a step has generated"
        workload.answer(
            wall_s=wall_s,
            rollout_s=rollout_s,
            teacher_s=teacher_s,
            train_s=wall_s - rollout_s - teacher_s,
            response_tokens=int(inputs[0]["completion_mask"].sum()),
            kl_nats=self.trainer._metrics["train"]["self_distillation/distillation_loss"][-1],
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def configure(folder: Path, load: workload.Workload) -> SDFTConfig:
    """SDFT's settings for the workload."""
    return SDFTConfig(
        output_dir=str(folder / "sdft"),
        use_cpu=True,
        bf16=load.variant != "float32",
        model_init_kwargs={"dtype": "bfloat16" if load.variant == "bfloat16" else "float32"},
        per_device_train_batch_size=len(load.prompts),
        max_steps=100_000,
        learning_rate=load.lr,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        num_generations=1,
        max_prompt_length=None,
        max_completion_length=load.new_tokens,
        temperature=1.0,
        generation_kwargs={"eos_token_id": None},
        distillation_mode="topk_logits",
        distillation_topk=256,
        distillation_alpha=1.0,
        distillation_is_clip=None,
        teacher_prompt_template=load.template.replace("{context}", "{privileged_context}"),
    )


def count_tokens(trainer: TimedTrainer, load: workload.Workload) -> dict[str, int]:
    """How many tokens the prompts of a step have."""
    students = [[{"role": "user", "content": prompt}] for prompt in load.prompts]
    texts = [load.template.format(context=load.context, prompt=prompt) for prompt in load.prompts]
    teachers = [[{"role": "user", "content": text}] for text in texts]
    return {
        "student_prompt_tokens": sum(map(len, trainer._tokenize_prompts(students))),
        "teacher_prompt_tokens": sum(map(len, trainer._tokenize_prompts(teachers))),
    }


def main() -> None:
    """Build the trainer, then do a step for each line of input."""
    folder = Path(sys.argv[1])
    load = workload.Workload.load((folder / "workload.json").read_text())
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "privileged_context": load.context}
        for prompt in load.prompts
    ]
    trainer = TimedTrainer(
        model=load.model,
        args=configure(folder, load),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(load.model),
        peft_config=LoraConfig(
            r=load.rank,
            lora_alpha=load.rank * 2,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    trainer.eos_token_ids = []
    trainer.add_callback(Driver(trainer))
    workload.answer(**count_tokens(trainer, load))
    trainer.train()


if __name__ == "__main__":
    main()
