"""NVIDIA machine code (SASS) as functions, natural loops and instructions, read from the output of ``nvdisasm -c``.

``Function.groups_in_flight`` is a must-analysis over the control-flow graph: for each instruction, the least number of
asynchronous matrix groups (wgmma) that have been issued and not waited for, over every path from the function's entry.
It is what proves that a softmax runs under a matrix product, which ptxas can undo without a word by hoisting a wait.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+):")
_SECTION = re.compile(r"^\s*\.section\s+(\S+?),")
_TARGET = re.compile(r"\.L_\w+")
_BRANCHES = {"BRA", "BRX", "BRXU", "JMP", "JMX"}
_ENDS = {"EXIT", "RET", "KILL"}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: in bytes from the start of the function.
        predicate: such as ``!P0``; empty if there is none.
        opcode: with modifiers, such as ``MUFU.EX2``.
        operands: as text.
    """

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """Opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def is_matrix(self) -> bool:
        """Whether it is a tensor-core instruction."""
        return self.base.endswith("MMA")

    @property
    def is_spill(self) -> bool:
        """Whether it moves a register from or to local memory."""
        return self.base in ("LDL", "STL")

    @property
    def commits_group(self) -> bool:
        """Whether it closes an asynchronous matrix group (the last wgmma of one)."""
        return self.base in ("HGMMA", "QGMMA", "IGMMA", "BGMMA") and "gsb0" in self.operands

    @property
    def waits_for_groups(self) -> int | None:
        """Groups that may still be in flight after this wait; None if it is no wait for matrix groups."""
        if not self.opcode.startswith("WARPGROUP.DEPBAR"):
            return None
        return int(self.operands.split(",")[1].strip(), 16)

    @property
    def targets(self) -> list[str]:
        """Labels that it may branch to."""
        return _TARGET.findall(self.operands) if self.base in _BRANCHES else []

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow it.

        A branch's condition is its predicate, or its first operand as in ``BRA.U UP0, L`` and ``BRA.DIV UR4, L``.
        """
        if self.predicate or self.base not in _BRANCHES | _ENDS:
            return True
        return self.base == "BRA" and "," in self.operands


@dataclass(frozen=True)
class Function:
    """Instructions of one function in address order, and the address of each label."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    @cached_property
    def blocks(self) -> dict[int, tuple[Instruction, ...]]:
        """Basic blocks by their first address, in address order."""
        leaders = set(self.labels.values())
        for here, after in zip(self.instructions, self.instructions[1:], strict=False):
            if here.base in _BRANCHES or here.base in _ENDS:
                leaders.add(after.address)
        blocks: dict[int, list[Instruction]] = {}
        current: list[Instruction] = []
        for instruction in self.instructions:
            if not blocks or instruction.address in leaders:
                current = blocks.setdefault(instruction.address, [])
            current.append(instruction)
        return {start: tuple(body) for start, body in blocks.items()}

    @cached_property
    def successors(self) -> dict[int, tuple[int, ...]]:
        """Blocks that may follow each block."""
        starts = list(self.blocks)
        result = {}
        for index, start in enumerate(starts):
            last = self.blocks[start][-1]
            following = [self.labels[label] for label in last.targets if label in self.labels]
            if last.falls_through and index + 1 < len(starts):
                following.append(starts[index + 1])
            result[start] = tuple(dict.fromkeys(following))
        return result

    @cached_property
    def entries(self) -> tuple[int, ...]:
        """The first block, and those that nothing visible branches to."""
        reached = {following for block in self.successors.values() for following in block}
        return tuple(start for index, start in enumerate(self.blocks) if index == 0 or start not in reached)

    @cached_property
    def groups_in_flight(self) -> dict[int, int]:
        """Address -> least number of wgmma groups in flight just before that instruction, over every path."""
        least = dict.fromkeys(self.entries, 0)
        pending = list(least)
        while pending:
            start = pending.pop()
            groups = least[start]
            for instruction in self.blocks[start]:
                groups = _after(instruction, groups)
            for following in self.successors[start]:
                if following not in least or groups < least[following]:
                    least[following] = groups
                    pending.append(following)
        result = {}
        for start, body in self.blocks.items():
            groups = least.get(start, 0)
            for instruction in body:
                result[instruction.address] = groups
                groups = _after(instruction, groups)
        return result

    @cached_property
    def loops(self) -> tuple["Loop", ...]:
        """Natural loops (a header that dominates the branch back to it), in address order of their headers."""
        predecessors: dict[int, list[int]] = {start: [] for start in self.blocks}
        for start, following in self.successors.items():
            for block in following:
                predecessors[block].append(start)
        dominators = self._dominators(predecessors)
        bodies: dict[int, set[int]] = {}
        for start, following in self.successors.items():
            for header in following:
                if header in dominators[start]:
                    body = bodies.setdefault(header, {header})
                    pending = [start]
                    while pending:
                        block = pending.pop()
                        if block not in body:
                            body.add(block)
                            pending.extend(predecessors[block])
        return tuple(Loop(self, header, frozenset(bodies[header])) for header in sorted(bodies))

    @property
    def main_loops(self) -> tuple["Loop", ...]:
        """Innermost loops that hold matrix instructions; one for each consumer of a warp-specialised kernel."""
        candidates = [loop for loop in self.loops if loop.matrix_instructions]
        return tuple(loop for loop in candidates if not any(other.blocks < loop.blocks for other in candidates))

    def _dominators(self, predecessors: dict[int, list[int]]) -> dict[int, set[int]]:
        everything = set(self.blocks)
        dominators = {start: {start} if start in self.entries else everything for start in self.blocks}
        changed = True
        while changed:
            changed = False
            for start in self.blocks:
                if start in self.entries:
                    continue
                new = set.intersection(*(dominators[block] for block in predecessors[start])) | {start}
                if new != dominators[start]:
                    dominators[start] = new
                    changed = True
        return dominators


def _after(instruction: Instruction, groups: int) -> int:
    """Groups in flight after an instruction: a predicated issue is not counted, a predicated wait is."""
    if instruction.commits_group and not instruction.predicate:
        return min(groups + 1, 8)
    allowed = instruction.waits_for_groups
    return groups if allowed is None else min(groups, allowed)


@dataclass(frozen=True)
class Loop:
    """A natural loop: its header and all its blocks, by first address.

    Side blocks (a masked tile, a change of segment) belong to it wherever the compiler placed them.
    """

    function: Function = field(repr=False)
    header: int
    blocks: frozenset[int] = field(repr=False)

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        """All its instructions in address order."""
        return tuple(i for start in sorted(self.blocks) for i in self.function.blocks[start])

    @cached_property
    def steady_path(self) -> tuple[Instruction, ...]:
        """One iteration as it usually runs.

        Of the paths from the header back to it, the shortest of those with the most matrix instructions.
        """
        order: list[int] = []
        state: dict[int, int] = {}
        retreating: set[tuple[int, int]] = set()
        stack = [(self.header, iter(self._inner(self.header)))]
        state[self.header] = 1
        while stack:
            start, following = stack[-1]
            for block in following:
                if state.get(block) == 1:
                    retreating.add((start, block))
                elif block not in state:
                    state[block] = 1
                    stack.append((block, iter(self._inner(block))))
                    break
            else:
                state[start] = 2
                order.append(start)
                stack.pop()
        best: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {}
        for start in order:
            body = self.function.blocks[start]
            closes = self.header in self.function.successors[start]
            options: list[tuple[tuple[int, int], tuple[int, ...]]] = [((0, 0), ())] if closes else []
            options += [
                best[block] for block in self._inner(start) if (start, block) not in retreating and block in best
            ]
            if options:
                (matrix, length), tail = min(options)
                best[start] = ((matrix - sum(i.is_matrix for i in body), length + len(body)), (start, *tail))
        return tuple(i for start in best[self.header][1] for i in self.function.blocks[start])

    @property
    def mix(self) -> Counter[str]:
        """Number of instructions on the steady path by opcode without modifiers."""
        return Counter(i.base for i in self.steady_path)

    @property
    def matrix_instructions(self) -> tuple[Instruction, ...]:
        """Its tensor-core instructions."""
        return tuple(i for i in self.instructions if i.is_matrix)

    @property
    def spills(self) -> int:
        """Local-memory loads and stores, side blocks included."""
        return sum(i.is_spill for i in self.instructions)

    @property
    def group_waits(self) -> tuple[int, ...]:
        """Groups left in flight by each wait; more waits than matrix products mean that ptxas serialised them."""
        return tuple(w for i in self.instructions if (w := i.waits_for_groups) is not None)

    def in_flight_at(self, opcode: str) -> Counter[int]:
        """How many instructions have how many groups in flight.

        Args:
            opcode: how their opcodes start, such as ``MUFU.EX2``.

        Returns:
            {least wgmma groups in flight: number of such instructions}, side blocks included.
        """
        groups = self.function.groups_in_flight
        return Counter(groups[i.address] for i in self.instructions if i.opcode.startswith(opcode))

    def _inner(self, start: int) -> list[int]:
        """Blocks of this loop that may follow, the header excluded."""
        return [block for block in self.function.successors[start] if block in self.blocks and block != self.header]


def parse_sass(text: str) -> Iterator[Function]:
    """Functions in the output of ``nvdisasm -c``."""
    name: str | None = None
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in text.splitlines():
        section = _SECTION.match(line)
        if section:
            if name is not None:
                yield Function(name, tuple(instructions), labels)
            name = section.group(1).removeprefix(".text.") if section.group(1).startswith(".text.") else None
            instructions, labels, pending = [], {}, []
            continue
        if name is None:
            continue
        label = _LABEL.match(line.strip())
        if label:
            pending.append(label.group(1))
            continue
        found = _INSTRUCTION.search(line)
        if found:
            address = int(found.group(1), 16)
            labels.update(dict.fromkeys(pending, address))
            pending = []
            instructions.append(Instruction(address, found.group(2) or "", found.group(3), found.group(4)))
    if name is not None:
        yield Function(name, tuple(instructions), labels)
