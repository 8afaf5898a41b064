"""Sentences to vectors: a hashing encoder that needs no model, and sentence-transformers where a model is at hand.

Both end in a projection to a few dimensions that is fitted on train sentences only. The hashed words themselves need no
fit, so nothing of a later date can enter through a vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.preprocessing import normalize

Float32Array = npt.NDArray[np.float32]

CHUNK_SENTENCES = 65_536
MAX_TOKENS = 64  # that a model sees of a sentence
BATCH_SENTENCES = 128


class MissingPackage(ImportError):
    """An optional package that a recipe asks for is not installed; the message says what to do."""


@dataclass(frozen=True)
class HashingEncoder:
    """Hashed words, weighted by TF-IDF, projected by a truncated SVD; offline, and the same for the same number
    of threads.

    Attributes:
        weights: [buckets] float32, inverse document frequencies of the train sentences.
        projection: [buckets, dim] float32, the leading right singular vectors over their spread on train: components
            have unit variance there.
        center: [dim] float32, the train mean.
    """

    weights: Float32Array
    projection: Float32Array
    center: Float32Array

    @classmethod
    def fit(cls, sentences: Sequence[str], *, dim: int, buckets: int, seed: int) -> "HashingEncoder":
        """Fit on train sentences: [T] strings to a ``dim``-dimensional encoder."""
        counts = _counts(sentences, buckets)
        weights = TfidfTransformer().fit(counts).idf_.astype(np.float32)
        weighted = _weighted(counts, weights)
        rank = min(dim, weighted.shape[0], weighted.shape[1] - 1)
        svd = TruncatedSVD(n_components=rank, n_iter=4, random_state=seed)
        with np.errstate(invalid="ignore"):  # the share of explained variance, not used, is 0/0 for equal sentences
            scores = svd.fit_transform(weighted)
        deviation = scores.std(axis=0)
        spread = np.where(deviation > 1e-6 * np.abs(scores).max(), deviation, 1.0)
        projection = np.zeros((buckets, dim), np.float32)
        projection[:, :rank] = svd.components_.T / spread
        center = np.zeros(dim, np.float32)
        center[:rank] = scores.mean(axis=0) / spread
        return cls(weights, projection, center)

    def transform(self, sentences: Sequence[str]) -> Float32Array:
        """[T] strings to [T, dim] float32, about 100,000 short sentences a second on one core."""
        encoded = np.empty((len(sentences), self.projection.shape[1]), np.float32)
        for start in range(0, len(sentences), CHUNK_SENTENCES):
            chunk = sentences[start : start + CHUNK_SENTENCES]
            weighted = _weighted(_counts(chunk, len(self.weights)), self.weights)
            encoded[start : start + len(chunk)] = weighted @ self.projection - self.center
        return encoded


def _counts(sentences: Sequence[str], buckets: int) -> Any:
    """How often each bucket's words occur: [T] strings to a sparse [T, buckets] float32."""
    hasher = HashingVectorizer(
        n_features=buckets, alternate_sign=False, norm=None, dtype=np.float32, token_pattern=r"(?u)[\w$%'-]+"
    )
    return hasher.transform(sentences)


def _weighted(counts: Any, weights: Float32Array) -> Any:
    """Rows of unit length of (1 + log count) * weight; overwrites the counts."""
    np.log(counts.data, out=counts.data)
    counts.data += 1.0
    counts.data *= weights[counts.indices]
    return normalize(counts, copy=False)


@dataclass(frozen=True)
class ModelEncoder:
    """Embeddings of a sentence-transformers model, reduced by a PCA that is fitted on train sentences.

    Attributes:
        components: [dim, E] float32.
        mean: [E] float32, of the train embeddings.
        spread: [dim] float32, of the train scores.
    """

    components: Float32Array
    mean: Float32Array
    spread: Float32Array

    @classmethod
    def fit(cls, embeddings: Float32Array, *, dim: int, seed: int) -> "ModelEncoder":
        """Fit on the embeddings [T, E] of train sentences."""
        rank = min(dim, *embeddings.shape)
        if rank < dim:
            raise ValueError(
                f"ModelEncoder.fit: text_dim must be at most {rank} (train sentences and embedding size are "
                f"{embeddings.shape}), got {dim}."
            )
        pca = PCA(n_components=dim, random_state=seed).fit(embeddings)
        return cls(pca.components_, pca.mean_, np.maximum(np.sqrt(pca.explained_variance_), 1e-6).astype(np.float32))

    def transform(self, embeddings: Float32Array) -> Float32Array:
        """[T, E] embeddings to [T, dim] float32."""
        scores = embeddings @ self.components.T - self.mean @ self.components.T
        reduced: Float32Array = (scores / self.spread).astype(np.float32)
        return reduced


def model_embeddings(sentences: Sequence[str], model: str, cache: Path | None) -> Float32Array:
    """Embed sentences by a sentence-transformers model (name or local path), cached as float16 parquet under what they
    are; those of more than `MAX_TOKENS` are cut.

    Args:
        sentences: [T] strings.
        model: a model's name, or the directory it lies in; the environment variable HF_HUB_OFFLINE=1 keeps it from the
            network.
        cache: directory of the cache; None embeds every time.

    Returns:
        [T, E] float32. About 185 sentences a second on two cores for a six-layer model.
    """
    digest = hashlib.sha256(f"{model}\n{MAX_TOKENS}\n".encode())
    for sentence in sentences:
        digest.update(sentence.encode() + b"\0")
    path = cache / f"text-{digest.hexdigest()[:16]}.parquet" if cache is not None else None
    if path is not None and path.is_file():
        column = pq.read_table(path).column("embedding").combine_chunks()
        return np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(
            len(column), column.type.list_size
        )
    embeddings = _embed(sentences, model)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = pa.array(embeddings.astype(np.float16).reshape(-1))
        pq.write_table(
            pa.table({"embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])}),
            path,
            compression="zstd",
        )
    return embeddings.astype(np.float16).astype(np.float32)


def _embed(sentences: Sequence[str], model: str) -> Float32Array:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        raise MissingPackage(
            "Featurizer: text_model needs the package sentence-transformers, got none. "
            'Install fusedmm[text], or leave text_model="" for hashed words.'
        ) from None
    encoder: Any = SentenceTransformer(model)
    encoder.max_seq_length = MAX_TOKENS
    return np.asarray(
        encoder.encode(list(sentences), batch_size=BATCH_SENTENCES, show_progress_bar=True, convert_to_numpy=True),
        np.float32,
    )
