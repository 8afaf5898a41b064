"""Dataclasses of tensors that PyTorch sees into: torch.export, FSDP2 and `torch.utils._pytree` walk them, and they move
to a device like a tensor.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Context = tuple[tuple[str, ...], tuple[Any, ...]]


class TensorTree:
    """Base of a frozen dataclass whose tensors and sizes are the leaves of a pytree.

    ``static`` names the fields that are no leaves: two trees that differ in them are of another structure. A field that
    is None is no leaf either. What is put together from leaves is not checked again: they may be no tensors.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    _static: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, static: tuple[str, ...] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._static = static
        torch.serialization.add_safe_globals([cls])  # torch.load reads it, as the tensors that it is
        pytree.register_pytree_node(
            cls,
            _flatten,
            lambda leaves, context: _unflatten(cls, leaves, context),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            to_dumpable_context=lambda context: context,
            from_dumpable_context=_from_dumpable,
            flatten_with_keys_fn=_flatten_with_keys,
        )

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """The same on another device; from pinned memory with ``non_blocking`` nothing waits."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in pinned memory: what a DataLoader asks for with ``pin_memory=True``."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> Self:
        changed: Self = pytree.tree_map_only(Tensor, change, self)
        return changed


def _flatten_with_keys(tree: TensorTree) -> tuple[list[tuple[pytree.KeyEntry, Any]], Context]:
    names = [name for name in tree.__dataclass_fields__ if name not in tree._static]
    given = tuple(name for name in names if getattr(tree, name) is not None)
    leaves: list[tuple[pytree.KeyEntry, Any]] = [(pytree.GetAttrKey(name), getattr(tree, name)) for name in given]
    return leaves, (given, tuple(getattr(tree, name) for name in tree._static))


def _flatten(tree: TensorTree) -> tuple[list[Any], Context]:
    leaves, context = _flatten_with_keys(tree)
    return [leaf for _, leaf in leaves], context


def _unflatten(cls: type[TensorTree], leaves: Any, context: Context) -> TensorTree:
    given, static = context
    tree = object.__new__(cls)
    values = dict(zip(given, leaves, strict=True)) | dict(zip(cls._static, static, strict=True))
    for name in cls.__dataclass_fields__:
        object.__setattr__(tree, name, values.get(name))
    return tree


def _from_dumpable(dumped: Any) -> Context:
    """Undo JSON, which knows no tuples."""
    given, static = dumped
    return tuple(given), tuple(tuple(value) if isinstance(value, list) else value for value in static)
