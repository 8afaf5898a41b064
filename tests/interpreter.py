"""Triton's interpreter of 3.6 and of 3.9, made to do what that of 3.7 does."""

import importlib.metadata
from typing import Any


def mend_interpreter() -> None:
    """Do it in this process: 3.6 stumbles over NumPy 2.4, 3.9 over masks that hold for a whole tile."""
    for triton in importlib.metadata.distributions(name="triton"):
        if triton.version.startswith("3.6."):
            _mend_index()
        elif triton.version.startswith("3.9."):
            _mend_comparisons()


def _mend_index() -> None:
    """3.6 takes int() of a loop's bound, which is an array of one element: an error from NumPy 2.4 on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index


def _mend_comparisons() -> None:
    """3.9 gives a comparison the type of what is compared; spread over a tile it is a mask that a load refuses."""
    from triton.language import int1
    from triton.runtime import interpreter

    binary_op = interpreter.InterpreterBuilder.binary_op

    def binary_op_with_type(*arguments: Any) -> Any:
        result = binary_op(*arguments)
        if result.data.dtype == bool:
            result.dtype = int1
        return result

    interpreter.InterpreterBuilder.binary_op = binary_op_with_type
