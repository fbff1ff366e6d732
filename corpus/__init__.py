# Copyright 2026 The AIMv2 packing authors.
# SPDX-License-Identifier: Apache-2.0
"""
What is behind extract_features.py: images of a corpus to Parquet, in this process or on Ray Data.

    inputs    which files there are          stages    images to patches, patches to rows
    readers   files to images: of archives   output    the Parquet files: locked, published, replaced
              and tables in files of their   done      what an output holds of an input, and what changed
              own                            shards    an input divided among jobs
    models    the model repo                 run       what is to be done, and what was
    settings  what rows depend on            in_process, on_ray    the two engines
    ring      batches between processes      writer    files that are written meanwhile
"""
