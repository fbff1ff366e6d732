# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Fine-tunes the encoder to classify images of mixed sizes, with transformers' Trainer and batches of a fixed number of
patches:

    python examples/finetune.py --output runs/digits
    torchrun --nproc-per-node 2 examples/finetune.py --output runs/digits             # a copy of the model per process
    torchrun --nproc-per-node 2 examples/finetune.py --output runs/digits --fsdp      # the model divided (FSDP2)

Run it again and it goes on from the last checkpoint; with `--fsdp` the checkpoints hold the model alone, which is all
that Trainer saves of a model that was divided when it was loaded. The images are the handwritten digits of
scikit-learn, enlarged to many sizes and aspect ratios; `--model` takes a model repo to begin with instead
of a small model with random weights.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_utils import get_last_checkpoint


REPO = str(Path(__file__).resolve().parent.parent)
Aimv2PackingModel = get_class_from_dynamic_module("modeling_aimv2_packing.Aimv2PackingModel", REPO)
Aimv2PackingConfig = Aimv2PackingModel.config_class
Aimv2PackingImageProcessor = get_class_from_dynamic_module(
    "image_processing_aimv2_packing.Aimv2PackingImageProcessor", REPO
)
PatchBudgetBatchSampler = get_class_from_dynamic_module("batching_aimv2_packing.PatchBudgetBatchSampler", REPO)

NUM_CLASSES = 10
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}


class Aimv2PackingForImageClassification(PreTrainedModel):
    """The encoder, the mean of each image's patches, and a linear classifier."""

    config_class = Aimv2PackingConfig
    base_model_prefix = "aimv2_packing"
    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.aimv2_packing = Aimv2PackingModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, hidden_states, grid_thw, labels=None):
        features = self.aimv2_packing(hidden_states, grid_thw).last_hidden_state
        pooled = torch.segment_reduce(features.float(), "mean", lengths=grid_thw.prod(1))
        logits = self.classifier(pooled.to(self.classifier.weight.dtype))
        return ImageClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits.float(), labels), logits=logits
        )


class Digits(Dataset):
    """
    The digits whose number modulo 5 is in `remainders`: four fifths to train on, one to test with. Each is there
    `copies` times, every time at another size, aspect ratio and angle.
    """

    def __init__(self, processor, remainders: set[int], copies: int):
        self.processor = processor
        images, labels = load_digits(return_X_y=True)
        generator = np.random.default_rng(0)
        self.images, self.labels, self.sizes, self.angles = [], [], [], []
        for index in range(len(images)):
            if index % 5 in remainders:
                digit = Image.fromarray((images[index].reshape(8, 8) * (255 / 16)).astype(np.uint8))
                self.images += [digit] * copies
                self.labels += [int(labels[index])] * copies
                self.sizes += generator.integers(42, 85, (copies, 2)).tolist()
                self.angles += generator.uniform(-15, 15, copies).tolist()

    def num_patches(self) -> list[int]:
        """Known from the sizes, before any image is read."""
        return [self.processor.get_number_of_image_patches(*size) for size in self.sizes]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        height, width = self.sizes[item]
        image = self.images[item].resize((width, height), Image.Resampling.BICUBIC).rotate(self.angles[item])
        return {**self.processor(image, return_tensors="pt"), "labels": torch.tensor([self.labels[item]])}


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Packs: what the images hold lies end to end."""
    return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}


class PackedTrainer(Trainer):
    """Trainer whose batches hold about `patches_per_batch` patches, whatever the number of images."""

    def __init__(self, *args, patches_per_batch: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.patches_per_batch = patches_per_batch

    def packed_loader(self, dataset: Digits, **options) -> DataLoader:
        sampler = PatchBudgetBatchSampler(dataset.num_patches(), self.patches_per_batch, **options)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)

    def get_train_dataloader(self) -> DataLoader:
        # The sampler divides the batches among the processes, so the loader is not prepared by accelerate, which would
        # divide them once more.
        return self.packed_loader(
            self.train_dataset,
            shuffle=True,
            seed=self.args.seed,
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
        )

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        return self.packed_loader(self.eval_dataset)


class NewOrderEachEpoch(TrainerCallback):
    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.batch_sampler.set_epoch(round(state.epoch or 0))


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--output", required=True, type=Path, help="folder for checkpoints and the trained model")
    parser.add_argument("--model", help="model repo to begin with; by default a small model with random weights")
    parser.add_argument("--fsdp", action="store_true", help="divide the model among the processes of torchrun")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save-steps", type=int, default=250)
    parser.add_argument("--patches-per-batch", type=int, default=512)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # Before the model: this also joins the processes that torchrun has started.
    training = TrainingArguments(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        save_steps=arguments.save_steps,
        save_only_model=arguments.fsdp,
        save_total_limit=2,
        logging_steps=max(1, arguments.steps // 40),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    set_seed(training.seed)
    start = arguments.model
    if start is None:
        start = arguments.output / "initial"
        with training.main_process_first():
            if not start.exists():
                Aimv2PackingForImageClassification(Aimv2PackingConfig(**SMALL, num_labels=NUM_CLASSES)).save_pretrained(
                    start
                )
    distributed = {"distributed_config": DistributedConfig(fsdp_size=training.world_size)} if arguments.fsdp else {}
    model = Aimv2PackingForImageClassification.from_pretrained(start, num_labels=NUM_CLASSES, **distributed)

    processor = Aimv2PackingImageProcessor(min_patches=9, max_patches=36)
    trainer = PackedTrainer(
        model,
        training,
        train_dataset=Digits(processor, {0, 1, 2, 3}, copies=4),
        eval_dataset=Digits(processor, {4}, copies=1),
        compute_metrics=accuracy,
        callbacks=[NewOrderEachEpoch()],
        patches_per_batch=arguments.patches_per_batch,
    )
    trainer.train(resume_from_checkpoint=None if arguments.fsdp else get_last_checkpoint(arguments.output))
    trainer.save_model(arguments.output)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        print(f"accuracy on {len(trainer.eval_dataset)} images: {metrics['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
