# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
From Parquet to neighbours: the images of an output of extract_features.py that are most like one of them.

    python extract_features.py --model REPO --input photographs --output features
    python examples/search_features.py features --query cat.jpg [--count 5] [--faiss]

Rows with an error have no embedding and are left out; the order of files and rows does not matter.
"""

import argparse

from loading import run  # first: it says what is not installed


# isort: split
import numpy as np


def read_embeddings(output: str) -> tuple[list[str], np.ndarray]:
    """The ids, and one unit vector for each: float32 of shape (num_images, embedding_size)."""
    import fsspec
    import pyarrow.dataset as ds

    fs, path = fsspec.core.url_to_fs(output)
    if not fs.exists(path):
        raise FileNotFoundError(f"{output} does not exist: give what extract_features.py was given as --output.")
    # What is no Parquet file begins with a dot, and pyarrow passes over it.
    dataset = ds.dataset(path, filesystem=fs, format="parquet")
    table = dataset.to_table(columns=["id", "embedding"], filter=ds.field("error").is_null())
    column = table["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    return table["id"].to_pylist(), vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities and rows of the nearest, best first, each of shape (num_queries, count)."""
    similarity = queries @ vectors.T
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(similarity, rows, axis=1), rows


def search_with_faiss(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """As `search`, on an exact index; one of FAISS's approximate ones holds many more vectors."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ImportError("--faiss needs FAISS: pip install faiss-cpu") from error

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index.search(queries, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="what extract_features.py was given as --output")
    parser.add_argument("--query", required=True, help="id of an image")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--faiss", action="store_true", help="search with FAISS instead of NumPy")
    arguments = parser.parse_args()
    ids, vectors = read_embeddings(arguments.output)
    if arguments.query not in ids:
        parser.error(f"{arguments.query} is no id of {arguments.output}, or its row holds an error")
    find = search_with_faiss if arguments.faiss else search
    query = vectors[ids.index(arguments.query)][None]
    similarity, rows = find(vectors, query, min(arguments.count, len(ids)))
    for value, row in zip(similarity[0], rows[0], strict=True):
        print(f"{value:.4f}  {ids[row]}")


if __name__ == "__main__":
    run(main)
