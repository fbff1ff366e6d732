# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
Pictures of a folder found by words: each query is a row of the contact sheet, best hits first, with their cosine
similarity.

    python examples/search_by_words.py [--checkpoint CHECKPOINT] [--folder FOLDER] [--output FILE.png] QUERY ...

With `--features`, the output of `extract_features.py --pooling projection --input FOLDER`, no picture is encoded.
"""

import argparse
import json
from pathlib import Path

from loading import PHOTOGRAPHS, REPO, require_converted, run, save_picture  # first: it says what is not installed


# isort: split
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.ImageOps
import torch
from folder_features import image_files, packed_batches
from tokenizers import pre_tokenizers
from transformers import AutoModel, AutoProcessor, CLIPTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conversion.local_code import local_class
from conversion.messages import printable, say
from extract_features import positive


open_image = local_class("image_processing_aimv2_packing.open_image")

THUMBNAIL, MARGIN, LINE = 160, 8, 18


def load(checkpoint: str | None):
    """Processor and model of a converted checkpoint; without one, a small model whose random weights say nothing."""
    if checkpoint:
        require_converted(checkpoint)
        model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, use_safetensors=True)
        if not hasattr(model, "get_text_features"):
            raise ValueError(
                f"{checkpoint} has no text encoder, only a vision tower: convert an image-text (LiT) checkpoint."
            )
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    else:
        print("No --checkpoint: the weights are random, and so are the hits.")
        torch.manual_seed(0)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        tokenizer = CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
        part = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = {**part, "vocab_size": len(tokens), "eos_token_id": tokenizer.eos_token_id}
        model_class = get_class_from_dynamic_module(
            "accelerated_image_text_aimv2_packing.Aimv2PackingAcceleratedImageTextModel", REPO
        )
        model = model_class(model_class.config_class(vision_config=part, text_config=text, projection_dim=64))
        images_class = get_class_from_dynamic_module("image_processing_aimv2_packing.Aimv2PackingImageProcessor", REPO)
        processor_class = get_class_from_dynamic_module("processing_aimv2_packing.Aimv2PackingProcessor", REPO)
        processor = processor_class(images_class.from_pretrained(REPO, image_size=224), tokenizer)
    return processor, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def embed_pictures(
    paths: list[str], processor, model, max_patches_per_batch: int = 8192
) -> tuple[list[Path], torch.Tensor]:
    """The pictures that can be read, and one unit vector for each, `(num_pictures, projection_dim)`."""
    read: list[Path] = []
    vectors = []
    for names, hidden_states, grid_thw in packed_batches(paths, processor.image_processor, max_patches_per_batch):
        read += map(Path, names)
        vectors.append(model.get_image_features(hidden_states.to(model.device), grid_thw).pooler_output)
    if not read:
        raise ValueError(f"None of {len(paths)} pictures can be read.")
    return read, torch.nn.functional.normalize(torch.cat(vectors), dim=1).cpu()


def read_features(features: Path, folder: Path, checkpoint: str | None) -> tuple[list[Path], torch.Tensor]:
    """
    Paths and unit vectors of the rows that a run of `extract_features.py` over `folder` wrote.

    Raises:
        ValueError: they are not projected, or of other weights than the checkpoint's.
    """
    from search_features import read_embeddings

    from corpus.models import model_folder
    from corpus.settings import weights_of

    # Older outputs have it without the dot, and shards one each.
    names = (".settings.json", "_settings.json", "shard=*/.settings.json")
    settings = [file for name in names for file in sorted(features.glob(name))]
    weights = weights_of(model_folder(checkpoint, None)[0]) if checkpoint else None
    for record in [json.loads(file.read_text()) for file in settings] or [{}]:
        if record.get("pooling") != "projection":
            raise ValueError(
                f"{features} must be written with `extract_features.py --pooling projection`, got --pooling "
                f"{record.get('pooling')}: only projected features compare with words."
            )
        if record.get("weights", weights) != weights:
            raise ValueError(
                f"{features} was made by other weights than those of --checkpoint {checkpoint}: give its model."
            )
    names, vectors = read_embeddings(str(features))
    return [folder / name for name in names], torch.from_numpy(vectors)


@torch.no_grad()
def embed_words(queries: list[str], processor, model) -> torch.Tensor:
    """One unit vector per query, `(num_queries, projection_dim)`; a query too long is cut off."""
    longest = model.config.text_config.max_position_embeddings
    inputs = processor(text=queries, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return torch.nn.functional.normalize(model.get_text_features(**inputs.to(model.device)).pooler_output, dim=1).cpu()


def contact_sheet(queries: list[str], hits: list[list[tuple[float, Path]]], title: str) -> PIL.Image.Image:
    cell, row = THUMBNAIL + MARGIN, THUMBNAIL + 3 * LINE
    width = max(MARGIN + cell * max(map(len, hits)), 4 * cell)
    sheet = PIL.Image.new("RGB", (width, MARGIN + LINE + row * len(queries)), "white")
    draw, font = PIL.ImageDraw.Draw(sheet), PIL.ImageFont.load_default(12)
    draw.text((MARGIN, MARGIN), title, "black", font)
    for index, (query, found) in enumerate(zip(queries, hits, strict=True)):
        top = MARGIN + LINE + row * index
        draw.text((MARGIN, top), query, "black", font)
        for column, (score, path) in enumerate(found):
            left = MARGIN + cell * column
            upright = PIL.ImageOps.exif_transpose(open_image(path)).convert("RGB")
            thumbnail = PIL.ImageOps.contain(upright, (THUMBNAIL, THUMBNAIL))
            sheet.paste(thumbnail, (left, top + LINE))
            draw.text((left, top + LINE + THUMBNAIL), f"{score:.3f}  {path.name}"[:26], "black", font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queries", nargs="+", metavar="QUERY", help='such as "a photo of a cat"')
    parser.add_argument("--checkpoint", help="converted image-text checkpoint; without it, random weights")
    parser.add_argument("--folder", type=Path, default=PHOTOGRAPHS, help="of the pictures; default: the examples'")
    parser.add_argument("--features", type=Path, help="output of extract_features.py for this folder and checkpoint")
    parser.add_argument("--top", type=positive, default=6, help="hits per query (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("hits.png"), help="the contact sheet (%(default)s)")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".png":
        parser.error(f"--output must be a .png file, got {arguments.output}")
    if not arguments.output.parent.is_dir():
        parser.error(f"--output must be in a folder that exists, got {arguments.output}")
    if arguments.features:
        paths, pictures = read_features(arguments.features, arguments.folder, arguments.checkpoint)
        processor, model = load(arguments.checkpoint)
    else:
        files = image_files(arguments.folder)
        processor, model = load(arguments.checkpoint)
        paths, pictures = embed_pictures(files, processor, model)
    words = embed_words(arguments.queries, processor, model)
    if words.shape[1] != pictures.shape[1]:
        raise ValueError(
            f"{arguments.features} holds vectors of {pictures.shape[1]} values, but the checkpoint gives "
            f"{words.shape[1]}: give the one that they were made with."
        )
    hits = []
    for query, scores in zip(arguments.queries, words @ pictures.T, strict=True):
        best = scores.argsort(descending=True, stable=True)[: arguments.top].tolist()
        hits.append([(float(scores[index]), paths[index]) for index in best])
        print(query)
        for score, path in hits[-1]:
            say(f"  {score:.4f}  {printable(path)}")
    title = str(arguments.checkpoint) if arguments.checkpoint else "random weights: the order says nothing"
    save_picture(contact_sheet(arguments.queries, hits, title), arguments.output)
    print(f"Contact sheet: {arguments.output}")


if __name__ == "__main__":
    run(main)
