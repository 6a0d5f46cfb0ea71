"""Hopper's matrix instructions in a compiled kernel: what PTX asks of each, and what the machine code gives it.

wgmma reads its operands through 64-bit descriptors of shared memory, computed from constants and the warp's number.
Both texts are evaluated here for one thread, once from top to bottom (a loop's body as its first pass), and compared
operand by operand: an assembler that loses one of those numbers shows, without a GPU. A second check follows every
wgmma whose left operand lies in registers to its wait: nobody may write those registers before.
"""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterator

SHARED_BASE = 0x400  # where a block's shared memory begins on sm_90: the first KiB is the system's
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
Number = int | None  # None: not known from constants and the thread's number


@dataclasses.dataclass(frozen=True)
class Product:
    """One wgmma: descriptors of its operands. a is None where A lies in registers."""

    a: int | None
    b: int


# In place of a descriptor: not settled by constants and the warp; made from a uniform register that nobody wrote.
UNKNOWN, UNWRITTEN = -1, -2


def _value(number: Number) -> int:
    return UNKNOWN if number is None else number & MASK64


# PTX -----------------------------------------------------------------------------------------------------------------
_PTX_LINE = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*?);", re.M)


def _ptx_operations() -> dict[str, Callable[..., int]]:
    table = {"add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor}
    table |= {"shl": lambda a, s: a << (s & 63), "shr": lambda a, s: a >> (s & 63), "mov": lambda a: a}
    table |= {"cvt": lambda a: a, "bfe": lambda a, at, n: (a >> (at & 63)) & ((1 << (n & 63)) - 1), "mul": operator.mul}
    table |= {"mad": lambda a, b, c: a * b + c, "selp": lambda a, b, p: a if p else b}
    return table


_PTX = _ptx_operations()
_COMPARE = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
_COMPARE |= {"eq": operator.eq, "ne": operator.ne}


def ptx_products(text: str, thread: int) -> list[Product]:
    """Every wgmma of a PTX kernel, in order."""
    values: dict[str, Number] = {"%tid.x": thread, "global_smem": SHARED_BASE}

    def read(name: str) -> Number:
        name = name.strip()
        return int(name, 0) if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", name) else values.get(name)

    found = []
    for match in _PTX_LINE.finditer(text):
        name, rest = match[1].split("."), match[2]
        if name[0] == "wgmma" and name[1] == "mma_async":
            operands = re.sub(r"^\{[^}]*\},", "", rest).strip()
            in_registers = operands.startswith("{")
            operands = [part.strip() for part in re.sub(r"^\{[^}]*\},", "", operands).split(",")]
            a, b = (None, operands[0]) if in_registers else (_value(read(operands[0])), operands[1])
            found.append(Product(a, _value(read(b))))
            continue
        target, *sources = [part.strip() for part in rest.split(",")]
        numbers = [read(source) for source in sources]
        known = None not in numbers and bool(numbers)
        if name[0] == "shfl" and "idx" in name:  # the first lane's value, and this is the first lane
            values[target.split("|")[0]] = numbers[0]
        elif name[0] == "setp" and len(numbers) == 2:
            values[target] = int(_COMPARE[name[1]](*numbers)) if known and name[1] in _COMPARE else None
        elif name[0] in _PTX and "f32" not in name and "f16" not in name and "hi" not in name:
            bits = 64 if name[-1].endswith("64") or "wide" in name else 32
            try:
                values[target] = _PTX[name[0]](*numbers) & ((1 << bits) - 1) if known else None
            except TypeError:  # another number of operands than this table knows
                values[target] = None
        elif target.startswith("%"):
            values[target] = None
    return found


# Machine code --------------------------------------------------------------------------------------------------------
_SASS_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P[\dT]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of machine code; name and its suffixes apart."""

    address: int
    guard: str
    name: str
    flags: frozenset[str]
    operands: tuple[str, ...]

    @property
    def targets(self) -> range:
        """Vector registers that it writes."""
        if self.name in ("STG", "STS", "STL", "BRA", "BAR", "EXIT", "RED", "LDGSTS", "R2UR"):
            return range(0)
        second = self.name in ("SHFL", "LOP3", "VOTE", "MATCH") and self.operands[0].startswith("P")
        first = next(iter(self.operands[int(second) : 1 + int(second)]), "")
        if not re.fullmatch(r"R\d+", first):
            return range(0)
        count = 2 if self.flags & {"64", "WIDE"} or self.name == "CS2R" else 1
        count = 4 if self.flags & {"128"} or {"M88", "4"} <= self.flags or {"MT88", "4"} <= self.flags else count
        if self.name == "HGMMA":
            count = next(int(f.split("x")[1]) // 2 for f in self.flags if re.fullmatch(r"\d+x\d+x\d+", f))
        return range(int(first[1:]), int(first[1:]) + count)


def instructions(sass: str) -> list[Instruction]:
    """The kernel's instructions, from `cuobjdump -sass`."""
    found = []
    for match in _SASS_LINE.finditer(sass):
        name, *flags = match[3].split(".")
        operands = tuple(part.strip().replace(".reuse", "") for part in match[4].split(",")) if match[4] else ()
        found.append(Instruction(int(match[1], 16), match[2] or "", name, frozenset(flags), operands))
    return found


class _Machine:
    """Registers of one thread; what constants and the thread's number do not settle is None."""

    def __init__(self, thread: int):
        self.thread = thread
        self.values: dict[str, Number] = {}
        self.stack: dict[str, Number] = {}
        self.unwritten: set[str] = set()  # registers made from one that nobody wrote

    def descriptor(self, at: int) -> int:
        pair = {f"UR{at}", f"UR{at + 1}"}
        return UNWRITTEN if pair & self.unwritten or pair - set(self.values) else _value(self.wide(f"UR{at}"))

    def read(self, name: str) -> Number:
        if name.startswith(("-", "~")) and not name[1:2].isdigit():
            inner = self.read(name[1:])
            return None if inner is None else (-inner if name[0] == "-" else ~inner) & MASK32
        if name in ("RZ", "URZ"):
            return 0
        if re.fullmatch(r"-?0x[0-9a-f]+", name):
            return int(name, 16) & MASK32
        return self.values.get(name)

    def wide(self, name: str) -> Number:
        if name.startswith(("-0x", "0x")):
            return int(name, 16) & MASK64
        if name in ("RZ", "URZ"):
            return 0
        if name.startswith("-"):
            inner = self.wide(name[1:])
            return None if inner is None else -inner & MASK64
        kind, at = re.fullmatch(r"(U?R)(\d+)", name).groups()
        low, high = self.values.get(name), self.values.get(f"{kind}{int(at) + 1}")
        return None if low is None or high is None else low | high << 32

    def predicate(self, name: str) -> Number:
        inverted, name = name.startswith("!"), name.lstrip("!")
        known = 1 if name in ("PT", "UPT") else self.values.get(name)
        return None if known is None else int(bool(known) != inverted)

    def run(self, i: Instruction) -> None:
        if not i.operands:
            return
        if i.name == "STL":
            self.stack[i.operands[0]] = self.read(i.operands[1]) if not i.flags & {"64", "128"} else None
            return
        results = self._results(i)
        self._follow_unwritten(i, results)
        taken = 1 if not i.guard else self.predicate(i.guard)
        for register in i.targets:
            results.setdefault(f"R{register}", None)
        for name, number in results.items():
            if taken is None:
                self.values[name] = None
            elif taken:
                self.values[name] = number

    def _follow_unwritten(self, i: Instruction, results: dict[str, Number]) -> None:
        """A uniform register before its first write holds nothing, and R1, the stack's address, no descriptor."""
        sources = {f"{kind}{at}" for o in i.operands[1:] for kind, at in re.findall(r"^-?(UR|R)(\d+)$", o)}
        if "64" in i.flags and i.name == "UIADD3":
            sources |= {f"UR{int(source[2:]) + 1}" for source in sources}
        empty = {source for source in sources if source.startswith("UR")} - set(self.values) | sources & {"R1"}
        if empty or sources & self.unwritten:
            self.unwritten |= set(results)
        else:
            self.unwritten -= set(results)

    def _results(self, i: Instruction) -> dict[str, Number]:
        target, *rest = i.operands
        name, flags = i.name.removeprefix("U"), i.flags
        carries = [o for o in rest[:1] if re.fullmatch(r"U?P\d", o)]
        if i.name in ("LDC", "ULDC", "LDCU"):
            count = 4 if "128" in flags else 2 if "64" in flags else 1
            kind, at = re.fullmatch(r"(U?R)(\d+|Z)", target).groups()
            return {} if at == "Z" else {f"{kind}{int(at) + k}": None for k in range(count)}
        if i.name in ("S2R", "S2UR"):
            return {target: {"SR_TID.X": self.thread, "SR_CgaCtaId": 0}.get(rest[0])}
        if i.name == "CS2R" and rest[0] == "SRZ":
            return {f"R{register}": 0 for register in i.targets}
        if i.name == "LDL":
            return {target: self.stack.get(rest[0])} if not flags & {"64", "128"} else {}
        if i.name == "SHFL" and "IDX" in flags:
            return {rest[0]: self.read(rest[1])}
        if name in ("IADD3", "VIADD") and "64" in flags:
            numbers = [self.wide(o) for o in rest if re.fullmatch(r"-?(0x\w+|U?R(\d+|Z))", o)]
            total = None if None in numbers else sum(numbers) & MASK64
            kind, at = re.fullmatch(r"(U?R)(\d+)", target).groups()
            high = f"{kind}{int(at) + 1}"
            return {target: None, high: None} if total is None else {target: total & MASK32, high: total >> 32}
        if name == "ISETP":
            return {o: None for o in i.operands[:2] if re.fullmatch(r"U?P\d", o)} | self._comparison(i)
        if not re.fullmatch(r"U?R\d+", target):
            return {}
        sources = [o for o in rest if o not in carries]
        number = self._number(name, flags, sources)
        result = {target: None if number is None else number & MASK32}
        for carry in carries:
            result[carry] = None if number is None else number >> 32 & 1
        return result

    def _comparison(self, i: Instruction) -> dict[str, Number]:
        target, _, a, b = i.operands[:4]
        kind = next((f.lower() for f in i.flags if f.lower() in _COMPARE), None)
        a, b = self.read(a), self.read(b)
        if kind is None or "EX" in i.flags or a is None or b is None or not re.fullmatch(r"U?P\d", target):
            return {}
        if "U32" not in i.flags:
            a, b = (n - (1 << 32) if n >> 31 else n for n in (a, b))
        last = self.predicate(i.operands[-1]) if "AND" in i.flags else None
        return {target: None if last is None else int(_COMPARE[kind](a, b) and last)}

    def _number(self, name: str, flags: frozenset[str], sources: list[str]) -> Number:
        if name == "IADD3" and "X" in flags:
            *sources, first, second = sources
            carry = [self.predicate(o) for o in (first, second)]
            numbers = [self.read(o) for o in sources]
            return None if None in (*numbers, *carry) else sum(numbers) + sum(carry)
        if name == "SEL":
            chosen = self.predicate(sources[2])
            return None if chosen is None else self.read(sources[0] if chosen else sources[1])
        numbers = [self.read(o) for o in sources]
        if name in ("MOV", "R2UR"):
            return numbers[0]
        known = None not in numbers[:3]
        if name == "LOP3":
            # One known source can settle the result: x & 0 and the like are not needed here.
            return _lop3(*numbers[:4]) if known else None
        if not known or len(numbers) < 2:
            return None
        if name in ("IADD3", "VIADD"):
            return sum(numbers[:3])
        if name == "IMAD" and not flags & {"WIDE", "HI", "X"}:
            return numbers[0] * numbers[1] + numbers[2] if "IADD" not in flags else numbers[0] + numbers[2]
        if name == "SHF" and "U32" in flags:
            return numbers[2] >> (numbers[1] & 31) if "R" in flags else numbers[0] << (numbers[1] & 31)
        if name == "SGXT" and "U32" in flags:
            return numbers[0] & ((1 << (numbers[1] & 31)) - 1)
        if name == "LEA" and len(numbers) == 3:
            return numbers[1] + (numbers[0] << (numbers[2] & 31))
        if name == "LEA" and "HI" in flags and len(numbers) == 4 and numbers[3] is not None and "X" not in flags:
            return numbers[1] + ((numbers[2] << 32 | numbers[0]) >> (32 - (numbers[3] & 31)))
        return None


def _lop3(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for index in range(8):
        if table >> index & 1:
            picked = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            result |= picked
    return result & MASK32


def sass_products(code: list[Instruction], thread: int) -> list[Product]:
    """Every HGMMA of the machine code, in order."""
    machine, found = _Machine(thread), []
    for instruction in code:
        if instruction.name == "HGMMA":
            at = int(next(re.match(r"gdesc\[UR(\d+)\]", o)[1] for o in instruction.operands if o.startswith("gdesc")))
            a = None if in_registers(instruction) else machine.descriptor(at)
            found.append(Product(a, machine.descriptor(at + 2)))
        machine.run(instruction)
    return found


def in_registers(hgmma: Instruction) -> bool:
    """Whether A comes from registers."""
    return not hgmma.operands[1].startswith("gdesc")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """lost: one line for each operand that the machine code reads elsewhere than PTX said."""

    lost: list[str]
    compared: int
    unknown: int


def compare_descriptors(ptx: str, code: list[Instruction], warps: int) -> Comparison:
    """Every operand of every wgmma, for the first thread of each group of four warps.

    Raises ValueError where the two texts do not hold the same number of products.
    """
    lost, compared, unknown = [], 0, 0
    for thread in range(0, 32 * warps, 128):
        asked, given = ptx_products(ptx, thread), sass_products(code, thread)
        if len(asked) != len(given):
            raise ValueError(f"{len(asked)} products in PTX and {len(given)} in the machine code")
        for index, (want, have) in enumerate(zip(asked, given, strict=True)):
            for side in "ab":
                wanted, found = getattr(want, side), getattr(have, side)
                if wanted is None and found is None:
                    continue
                if UNKNOWN in (wanted, found):
                    unknown += 1
                    continue
                compared += 1
                if wanted != found:
                    shown = "from a register that nobody wrote" if found == UNWRITTEN else f"{found:#018x}"
                    lost.append(f"product {index}, warp {thread // 32}: {side.upper()} {shown} for {wanted:#018x}")
    return Comparison(lost, compared, unknown)


# Registers under an unfinished product -------------------------------------------------------------------------------
def reused_registers(code: list[Instruction]) -> list[str]:
    """Writes to the registers of a product's A, or to its sums, before the product has been waited for."""
    at = {instruction.address: index for index, instruction in enumerate(code)}
    lines = []
    for index, hgmma in enumerate(code):
        if hgmma.name == "HGMMA":
            first = int(hgmma.operands[1][1:]) if in_registers(hgmma) else None
            held = set(range(first, first + 4)) if first is not None else set()
            for culprit in _writes_before_wait(code, at, index, held):
                lines.append(f"{hgmma.address:#x} HGMMA still reads {hgmma.operands[1]}: {culprit}")
    return lines


def _writes_before_wait(code: list[Instruction], at: dict[int, int], start: int, held: set[int]) -> Iterator[str]:
    begun = int("gsb0" in code[start].operands)
    todo, seen = [(start + 1, begun)], set()
    while todo and held:
        index, groups = todo.pop()
        while index < len(code) and (index, groups) not in seen:
            seen.add((index, groups))
            i = code[index]
            if i.name == "WARPGROUP" and "DEPBAR" in i.flags and groups - 1 >= int(i.operands[1], 16):
                break
            if i.name == "HGMMA":
                groups = min(groups + int("gsb0" in i.operands), 9)
            elif held & set(i.targets):
                yield f"{i.address:#x} {i.name} writes {', '.join(f'R{r}' for r in sorted(held & set(i.targets)))}"
                break
            if i.name == "BRA":
                target = next((at.get(int(o, 16)) for o in i.operands if o.startswith("0x")), None)
                if target is not None:
                    todo.append((target, groups))
                if not i.guard:
                    break
            if i.name == "EXIT" and not i.guard:
                break
            index += 1
