# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Fine-tunes the encoder to classify images of mixed sizes, with transformers' Trainer and batches of a fixed number of
patches:

    python examples/finetune.py --output runs/digits
    python examples/finetune.py --output runs/pets --images pets --checkpoint CHECKPOINT    # pets/cat/*, pets/dog/*
    torchrun --nproc-per-node 2 examples/finetune.py --output runs/digits             # a copy of the model per process
    torchrun --nproc-per-node 2 examples/finetune.py --output runs/digits --fsdp      # the model divided (FSDP2)

Run it again and it goes on from the last checkpoint, or says that it has finished; another `--checkpoint` or other
classes need another `--output`. With `--fsdp` the checkpoints hold
the model alone, which is all that Trainer saves of a model that was divided when it was loaded. The output is a model
repo: `AutoModel.from_pretrained(OUTPUT, trust_remote_code=True)` gives the encoder, and
`Aimv2PackingForImageClassification.from_pretrained(OUTPUT)`, of this file, the classifier too.

`--images` takes a folder with a subfolder per class; of each class every fifth image tests. Without it, the images are
the handwritten digits of scikit-learn, enlarged to many sizes and aspect ratios.
"""

import argparse
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from loading import REPO, load, require_converted, run  # first: it says what is not installed


try:
    # Trainer needs it, and says less.
    import accelerate  # noqa: F401
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}. What is needed: pip install -r {REPO}/requirements-scale.txt")


# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from folder_features import image_files
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from extract_features import positive


Aimv2PackingModel = get_class_from_dynamic_module("accelerated_aimv2_packing.Aimv2PackingAcceleratedModel", REPO)
Aimv2PackingConfig = Aimv2PackingModel.config_class
PatchBudgetBatchSampler = get_class_from_dynamic_module("batching_aimv2_packing.PatchBudgetBatchSampler", REPO)

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "is_native": True,
    "use_head": False,
}


class Aimv2PackingForImageClassification(PreTrainedModel):
    """The encoder, its head's output or the mean of each image's patches, and a linear classifier."""

    config_class = Aimv2PackingConfig
    base_model_prefix = "vision_model"
    main_input_name = "hidden_states"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = Aimv2PackingModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, hidden_states, grid_thw, labels=None):
        outputs = self.vision_model(hidden_states, grid_thw)
        pooled = outputs.pooler_output
        if pooled is None:
            pooled = torch.segment_reduce(outputs.last_hidden_state.float(), "mean", lengths=grid_thw.prod(1))
        logits = self.classifier(pooled.to(self.classifier.weight.dtype))
        return ImageClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits.float(), labels), logits=logits
        )


class Images(Dataset):
    """Images and their classes; `num_patches` are known from the sizes, before any image is processed."""

    classes: list[str]
    labels: list[int]
    sizes: list[tuple[int, int]]

    def __init__(self, processor):
        self.processor = processor

    def num_patches(self) -> list[int]:
        return [self.processor.get_number_of_image_patches(*size) for size in self.sizes]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, item: int) -> Image.Image:
        raise NotImplementedError

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        inputs = self.processor(self.image(item), return_tensors="pt")
        return {**inputs, "labels": torch.tensor([self.labels[item]])}


class Digits(Images):
    """
    Four fifths of scikit-learn's digits to train on, or the last to test with. To train, each is there four times,
    every time at another size, aspect ratio and angle.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, processor, train: bool):
        super().__init__(processor)
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "The digits come from scikit-learn: pip install scikit-learn. Or give --images FOLDER, of your own."
            ) from error
        images, labels = load_digits(return_X_y=True)
        generator = np.random.default_rng(0)
        copies = 4 if train else 1
        self.images, self.labels, self.sizes, self.angles = [], [], [], []
        for index in range(len(images)):
            if (index % 5 != 4) == train:
                digit = Image.fromarray((images[index].reshape(8, 8) * (255 / 16)).astype(np.uint8))
                self.images += [digit] * copies
                self.labels += [int(labels[index])] * copies
                self.sizes += generator.integers(42, 85, (copies, 2)).tolist()
                self.angles += generator.uniform(-15, 15, copies).tolist()

    def image(self, item: int) -> Image.Image:
        height, width = self.sizes[item]
        return self.images[item].resize((width, height), Image.Resampling.BICUBIC).rotate(self.angles[item])


class ClassFolders(Images):
    """The images of a folder with a subfolder per class: four fifths of each class to train on, or the last."""

    def __init__(self, processor, train: bool, folder: Path):
        super().__init__(processor)
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if len(self.classes) < 2:
            raise ValueError(f"{folder} must have a subfolder per class, at least two, got {self.classes}.")
        self.paths, self.labels, self.sizes = [], [], []
        for label, name in enumerate(self.classes):
            paths = image_files(folder / name)
            if len(paths) < 5:
                raise ValueError(f"{folder / name} must hold at least 5 images, one of them to test, got {len(paths)}.")
            for path in [path for index, path in enumerate(paths) if (index % 5 != 4) == train]:
                with Image.open(path) as image:
                    self.sizes.append((image.height, image.width))
                self.paths.append(path)
                self.labels.append(label)

    def image(self, item: int) -> Image.Image:
        return self.processor.open_image(self.paths[item])


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Packs: what the images hold lies end to end."""
    return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}


class PackedTrainer(Trainer):
    """Trainer whose batches hold about `patches_per_batch` patches, whatever the number of images."""

    def __init__(self, *args, patches_per_batch: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.patches_per_batch = patches_per_batch

    def packed_loader(self, dataset: Images, **options) -> DataLoader:
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
    parser.add_argument("--checkpoint", help="converted checkpoint; without it, a small model with random weights")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images of your own: a subfolder per class")
    parser.add_argument("--fsdp", action="store_true", help="divide the model among the processes of torchrun")
    parser.add_argument("--steps", type=positive, default=2000)
    parser.add_argument("--save-steps", type=positive, default=250)
    parser.add_argument("--patches-per-batch", type=positive, help="default: 512, or as many as the largest image has")
    parser.add_argument("--gradient-accumulation-steps", type=positive, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    return parser.parse_args()


def finished(output: Path, steps: int) -> bool:
    """Whether a run has written its last file, after at least so many steps."""
    state = output / "trainer_state.json"
    return state.is_file() and json.loads(state.read_text())["global_step"] >= steps


def last_checkpoint(output: Path) -> str | None:
    """The last whole one: where a kill cut one short, the file that Trainer writes last is missing or no JSON."""
    steps = (folder.name.removeprefix("checkpoint-") for folder in output.glob("checkpoint-*"))
    for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True):
        folder = output / f"checkpoint-{step}"
        with suppress(FileNotFoundError, json.JSONDecodeError):
            json.loads((folder / "trainer_state.json").read_text())
            return str(folder)
    return None


def check_start(folder: Path, begun: dict) -> None:
    """
    Raises:
        ValueError: the run was begun with another checkpoint or other classes.
    """
    file = folder / "begun.json"
    # One of before there was this file goes on.
    was = json.loads(file.read_text()) if file.exists() else begun
    if changed := [f"{name} is {value}, was {was[name]}" for name, value in begun.items() if value != was[name]]:
        raise ValueError(
            f"{folder.parent} was begun with something else ({'; '.join(changed)}): give another --output."
        )


def source_of(checkpoint: str | None) -> str | None:
    """A folder by its whole path, however it was given; a Hub id as it is."""
    return str(Path(checkpoint).resolve()) if checkpoint and Path(checkpoint).exists() else checkpoint


def make_start(folder: Path, checkpoint: str | None, labels: dict, begun: dict) -> None:
    """The model to begin with, in float32: the encoder of a checkpoint, or random weights, and a new classifier."""
    if checkpoint is None:
        model = Aimv2PackingForImageClassification(Aimv2PackingConfig(**SMALL, **labels))
    else:
        _, encoder = load(checkpoint)
        config = Aimv2PackingConfig.from_dict({**encoder.config.to_dict(), **labels, "dtype": "float32"})
        model = Aimv2PackingForImageClassification(config)
        model.vision_model.load_state_dict(encoder.state_dict())
    # Renamed at the end: a killed run leaves no half of it.
    unfinished = folder.with_name("initial.unfinished")
    model.save_pretrained(unfinished)
    (unfinished / "begun.json").write_text(json.dumps(begun))
    unfinished.rename(folder)


def make_model_repo(output: Path, processor) -> None:
    """Puts the code, the processor and the way to them beside the weights that Trainer has saved."""
    if not (output / "config.json").exists():
        raise ValueError(
            f"Trainer has saved no whole model to {output}: run `accelerate launch --use_fsdp` with "
            "`--fsdp_state_dict_type FULL_STATE_DICT`."
        )
    for file in Path(REPO).glob("*_aimv2_packing.py"):
        shutil.copy(file, output)
    processor.save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    config["auto_map"] = json.loads(Path(REPO, "config.json").read_text())["auto_map"]
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    arguments = parse_arguments()
    if finished(arguments.output, arguments.steps):
        print(f"{arguments.output} has finished its {arguments.steps} steps: give more --steps, or another --output")
        return
    if arguments.checkpoint:
        require_converted(arguments.checkpoint)
        bounds = {}
    else:
        # The small model sees small images.
        bounds = {"min_patches": 9, "max_patches": 256 if arguments.images else 36}
    processor = AutoImageProcessor.from_pretrained(arguments.checkpoint or REPO, trust_remote_code=True, **bounds)
    if arguments.images:
        train_dataset, test_dataset = (ClassFolders(processor, train, arguments.images) for train in (True, False))
    else:
        train_dataset, test_dataset = (Digits(processor, train) for train in (True, False))
    largest = max(train_dataset.num_patches() + test_dataset.num_patches())

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
    labels = {
        "num_labels": len(train_dataset.classes),
        "id2label": dict(enumerate(train_dataset.classes)),
        "label2id": {name: index for index, name in enumerate(train_dataset.classes)},
    }
    start = arguments.output / "initial"
    begun = {"checkpoint": source_of(arguments.checkpoint), "classes": train_dataset.classes}
    with training.main_process_first():
        if start.exists():
            check_start(start, begun)
        else:
            make_start(start, arguments.checkpoint, labels, begun)
    distributed = {"distributed_config": DistributedConfig(fsdp_size=training.world_size)} if arguments.fsdp else {}
    model = Aimv2PackingForImageClassification.from_pretrained(start, use_safetensors=True, **distributed)

    trainer = PackedTrainer(
        model,
        training,
        train_dataset=train_dataset,
        eval_dataset=test_dataset,
        compute_metrics=accuracy,
        callbacks=[NewOrderEachEpoch()],
        patches_per_batch=arguments.patches_per_batch or max(512, largest),
    )
    trainer.train(resume_from_checkpoint=None if arguments.fsdp else last_checkpoint(arguments.output))
    trainer.save_model(arguments.output)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        make_model_repo(arguments.output, processor)
        print(f"accuracy on {len(test_dataset)} images: {metrics['eval_accuracy']:.3f}")
    # Last: this file says that the run has finished.
    trainer.save_state()


if __name__ == "__main__":
    run(main)
