# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
From Parquet to neighbours: the images of an output of extract_features.py that are most like one of them, like a
picture, or like words.

    python extract_features.py --model REPO --input photographs --output features
    python examples/search_features.py features --query cat.jpg [--count 5]
    python examples/search_features.py features --query-image picture.jpg
    python examples/search_features.py features --query-text "a cat"      # of an image-text model

A picture and words are encoded as the output's record says, by the model that it was begun with. FAISS searches where
it is installed (`pip install faiss-cpu`), else NumPy: both exactly. Rows with an error have no embedding and are left
out; the order of files and rows does not matter.
"""

import argparse
import dataclasses
import sys

from loading import REPO, run  # first: it says what is not installed


try:
    # The corpus' modules import it, and say less.
    import pyarrow as pa
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}. What is needed: pip install -r {REPO}/requirements-scale.txt")


# isort: split
import numpy as np
import torch
from transformers import AutoTokenizer

from conversion.messages import printable, say
from corpus.models import load_model, load_processor, model_folder
from corpus.output import Output
from corpus.settings import Settings, weights_of
from corpus.shards import recorded_shard
from corpus.stages import POOLINGS
from extract_features import positive


def read_embeddings(output: str) -> tuple[list[str], np.ndarray]:
    """The ids, and one unit vector for each: float32 of shape (num_images, embedding_size)."""
    import fsspec
    import pyarrow.dataset as ds

    fs, path = fsspec.core.url_to_fs(output)
    if not fs.exists(path):
        raise FileNotFoundError(f"{output} does not exist: give what extract_features.py was given as --output.")
    # What is no Parquet file begins with a dot, and pyarrow passes over it.
    try:
        dataset = ds.dataset(path, filesystem=fs, format="parquet")
        table = dataset.to_table(columns=["id", "embedding"], filter=ds.field("embedding").is_valid())
    except pa.ArrowInvalid as error:
        raise ValueError(f"{output} is no output of extract_features.py: {error}") from error
    if not len(table):
        raise ValueError(f"{output} holds no row with an embedding.")
    column = table["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1).astype(np.float32)
    return table["id"].to_pylist(), unit(vectors)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities and rows of the nearest, best first, each of shape (num_queries, count)."""
    similarity = queries @ vectors.T
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(similarity, rows, axis=1), rows


def search_with_faiss(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """As `search`, on an exact index; one of FAISS's approximate ones holds many more vectors."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index.search(queries, count)


class Encoder:
    """
    Queries to vectors in the space of an output.

    Raises:
        ValueError: the output has no record, or the model is no longer what it was begun with.
    """

    def __init__(self, output: str, model: str | None):
        shard = recorded_shard(output)
        record = shard[1] if shard else Output(output).record()
        if record is None:
            raise ValueError(f"{output} has no record of its model: give --query, the id of an image.")
        begun = record["begun"]
        self.folder, _ = model_folder(model or begun["model"], begun["commit"] if model is None else None)
        names = [field.name for field in dataclasses.fields(Settings)]
        self.settings = Settings(**{name: record[name] for name in names if name in record})
        if weights_of(self.folder) != self.settings.weights:
            raise ValueError(f"{output} was made by other weights than those of {self.folder}: give --model.")
        self.model = load_model(self.folder, self.settings)

    @torch.inference_mode()
    def image(self, picture: str) -> np.ndarray:
        """One unit vector of shape (1, embedding_size)."""
        processor = load_processor(self.folder)
        for name, value in self.settings.processor.items():
            if name != "backend":
                setattr(processor, name, value)
        inputs = processor(picture, return_tensors="pt")
        hidden_states = inputs["hidden_states"].to(self.model.dtype)
        embedding, _ = POOLINGS[self.settings.pooling](self.model, hidden_states, inputs["grid_thw"])
        return unit(embedding.float().numpy())

    @torch.inference_mode()
    def text(self, words: str) -> np.ndarray:
        """As `image`, of words; what is too long is cut off."""
        if self.settings.pooling != "projection":
            raise ValueError(f"--query-text needs projected features, got those of --pooling {self.settings.pooling}.")
        tokenizer = AutoTokenizer.from_pretrained(self.folder, config=self.model.config)
        longest = self.model.config.text_config.max_position_embeddings
        inputs = tokenizer([words], truncation=True, max_length=longest, return_tensors="pt")
        return unit(self.model.get_text_features(**inputs).pooler_output.float().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="what extract_features.py was given as --output")
    queries = parser.add_mutually_exclusive_group(required=True)
    queries.add_argument("--query", help="id of an image")
    queries.add_argument("--query-image", help="path or URL of a picture")
    queries.add_argument("--query-text", help='such as "a cat"')
    parser.add_argument("--model", help="where the model is now, if not where it was")
    parser.add_argument("--count", type=positive, default=5, help="of neighbours (%(default)s)")
    arguments = parser.parse_args()
    ids, vectors = read_embeddings(arguments.output)
    if arguments.query is not None:
        if arguments.query not in ids:
            parser.error(f"{arguments.query} is no id of {arguments.output}, or its row holds an error")
        query = vectors[ids.index(arguments.query)][None]
    else:
        encoder = Encoder(arguments.output, arguments.model)
        is_text = arguments.query_text is not None
        query = encoder.text(arguments.query_text) if is_text else encoder.image(arguments.query_image)
    count = min(arguments.count, len(ids))
    try:
        similarity, rows = search_with_faiss(vectors, query, count)
    except ModuleNotFoundError:
        similarity, rows = search(vectors, query, count)
    for value, row in zip(similarity[0], rows[0], strict=True):
        say(f"{value:.4f}  {printable(ids[row])}")


if __name__ == "__main__":
    run(main)
