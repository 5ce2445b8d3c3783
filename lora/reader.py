"""A LoRA file's tensors for one layer → deltas by parameter.

The tensors have roles (`up`, `alpha`, `lokr_w1`, `diff_b` ...). They are applied exactly, or refused in one sentence.
Tensors that need no conversion stay views of the mapped file: `deltas.pack` copies them. This module knows shapes,
number types and arithmetic; it knows no spelling of a layer.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora.adapter import Adapter, Factors
from lora.deltas import Decomposed, Delta, Full, Hadamard, Kronecker, LowRank, Replacement
from lora.names import LOHA, LOKR, Content, Layer, Part, short
from service.device_thread import check_cancelled

# How numbers may be stored. Float4 is packed in pairs that torch cannot take apart.
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
FLOATS |= {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu}
# The rows of FLUX.1's largest layer. No dimension of a tensor is larger: with such a rank, factors would have more
# numbers than the difference that they stand for.
MAX_DIMENSION = 21_504
# Of alpha / rank. Trainers use 0.1 to 100; factors of float32 times 10^30 are no numbers any more.
MAX_STRENGTH = 1e6
# Elements that are looked through between two checks for a cancellation.
PIECE = 2**22
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# Pairs of roles whose product has a rank, by PEFT's name for their kind; LoKr may have whole matrices instead.
PAIRS = {
    ("up", "down"): "LORA",
    ("hada_w1_a", "hada_w1_b"): "LOHA",
    ("lokr_w1_a", "lokr_w1_b"): "LOKR",
    ("lokr_w2_a", "lokr_w2_b"): "LOKR",
}

# Each of the two determines a weight or a bias. A magnitude belongs to the base plus a product, and to nothing else.
CONTRADICTIONS = ({"value", "diff"}, {"value_b", "diff_b"}, {"magnitude", "value"}, {"magnitude", "diff"})
# FLUX.1's relatives with more input channels, by how many times as many.
WIDER = {
    2: "This is a control LoRA, and a control LoRA needs a control image, which cannot be given here",
    6: "This LoRA is made for FLUX.1 Fill, which is given an image and its mask as channels",
}
OTHER_INPUT = "This LoRA is made for another model than FLUX.1 [dev] and [schnell]"


def factors_of(layer: Layer, content: Content, shape: Callable[[str], Sequence[int]]) -> Iterator[Factors]:
    """A layer's pairs of factors, by the shapes of the tensors that are named in its content."""
    tensors = content.tensors
    for (left, right), kind in PAIRS.items():
        if {left, right} <= tensors.keys():
            rows = layer.shape[0] if kind == "LORA" else None
            rank = _rank(shape(tensors[left]), shape(tensors[right]), rows)
            yield Factors(content.names, kind, rank, "alpha" in tensors)
    if {"lokr_w1", "lokr_w2"} <= tensors.keys():
        yield Factors(content.names, "LOKR", None, "alpha" in tensors)


def _rank(left: Sequence[int], right: Sequence[int], rows: int | None) -> int | None:
    """The rank of a pair [rows, rank], [rank, in], or of one that is stored transposed; None where it is neither."""
    if min(len(left), len(right)) < 2:
        return None
    if _is_transposed(left, right, rows):
        return left[0]
    return right[0] if left[1] == right[0] and rows in (None, left[0]) else None


def _is_transposed(left: Sequence[int], right: Sequence[int], rows: int | None) -> bool:
    """Whether a pair is [rank, rows], [in, rank], and not the usual way too."""
    usual = (left[0], left[1]) == (rows, right[0])
    return not usual and (left[0], left[1]) == (right[1], rows)


def name_full_ranks(
    contents: Mapping[Layer, Content], ranks: Collection[int | None], shape: Callable[[str], Sequence[int]]
) -> None:
    """Give the lone factors that ai-toolkit's fullrank writes the role of differences.

    Such a factor has the rows of its layer. Where the file has pairs of that rank too, it may also be half of a pair.
    """
    for layer, content in contents.items():
        tensors = content.tensors
        if "down" in tensors and not tensors.keys() & {"up", "mid", "magnitude", "diff"}:
            rows = next(iter(shape(tensors["down"])), None)
            if rows == layer.shape[0] and rows not in ranks:
                tensors["diff"] = tensors.pop("down")


class LayerReader:
    """Makes deltas of a file's tensors for one layer, which `get` reads by their names."""

    def __init__(self, layer: Layer, content: Content, get: Callable[[str], Tensor], adapter: Adapter) -> None:
        self.kinds: set[str] = set()
        self.ranks: set[int] = set()
        self._used: set[str] = set()
        self._layer, self._names, self._tensors = layer, content.names, content.tensors
        self._get, self._adapter = get, adapter

    def deltas(self) -> Iterator[tuple[str, Delta]]:
        """Deltas with the names of their parameters; a ValueError is a sentence about a tensor that is not usable."""
        roles = self._tensors.keys()
        if read_factors := self._factor_reader():
            names = [f"{part.name}.weight" for part in self._layer.parts]
            parts = list(zip(names, read_factors(), strict=True))
            yield from self._decomposed(parts) if "magnitude" in roles else parts
        for role, make in (("diff", Full), ("value", Replacement), ("diff_b", Full), ("value_b", Replacement)):
            if role in roles:
                self.kinds.add("differences" if make is Full else "values")
                yield from self._whole(role, make)
        if "up_bias" in roles:
            yield from self._whole("up_bias", self._up_bias)
        # An alpha means nothing beside whole tensors, and trainers write it all the same.
        if unused := roles - self._used - {"alpha"}:
            names = ", ".join(self._name(role) for role in sorted(unused))
            raise ValueError(f"The LoRA has {names}, which says nothing beside the rest that it has for {self._layer}.")

    def _factor_reader(self) -> Callable[[], list[Delta]] | None:
        """The reader of the layer's factors, None where it has none; refuses two kinds of change to one tensor."""
        roles = self._tensors.keys()
        readers = ((self._lora, ("up", "down", "mid")), (self._loha, LOHA), (self._lokr, LOKR))
        fitting = [reader for reader, own in readers if not roles.isdisjoint(own)]
        if len(fitting) > 1 or any(pair <= roles for pair in CONTRADICTIONS):
            raise ValueError(f"The LoRA changes {self._layer} in two ways at once: {', '.join(sorted(roles))}.")
        if not fitting and "magnitude" in roles:
            raise self._incomplete("magnitude")
        if roles == {"alpha"}:
            raise self._incomplete("alpha")
        return fitting[0] if fitting else None

    def _lora(self) -> list[Delta]:
        if self._adapter.decomposed and "magnitude" not in self._tensors:
            raise ValueError(f"The LoRA's {self._adapter.source} says use_dora, but {self._layer} has no magnitude.")
        up, down = self._pair_of_factors()
        down = self._tucker("mid", down)
        self._check_fit(_product_shape(up, down), "up", "down")
        self.kinds.add("DoRA" if "magnitude" in self._tensors else "LoRA")
        strength = self._strength(len(down))
        return [LowRank(part.start, part.height, _rows(up, part), down, strength) for part in self._layer.parts]

    def _pair_of_factors(self) -> tuple[Tensor, Tensor]:
        """[out, rank] and [rank, in]; MLX stores them transposed, under names without `.weight`."""
        up, down = self._matrix("up"), self._matrix("down")
        out = self._layer.shape[0]
        both_ways = up.shape == (out, out) and down.shape == self._layer.shape == (out, out)
        if both_ways and not self._name("down").endswith(".weight"):
            raise ValueError(
                f"{self._name('down')} is {_size(down.shape)}, as large as {self._layer}: whether its rows or its "
                "columns are the rank cannot be told; lora_A.weight would be [rank, in]."
            )
        return (up.T, down.T) if _is_transposed(up.shape, down.shape, out) else (up, down)

    def _loha(self) -> list[Delta]:
        (a, b), (c, d) = self._pair("hada_w1", "hada_t1"), self._pair("hada_w2", "hada_t2")
        first, second = _product_shape(a, b), _product_shape(c, d)
        self._check_fit(first if first == second else (), "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        self.kinds.add("LoHa")
        strength = self._strength(len(b))
        return [
            Hadamard(part.start, part.height, _rows(a, part), b, _rows(c, part), d, strength)
            for part in self._layer.parts
        ]

    def _lokr(self) -> list[Delta]:
        sides, shapes, ranks = [], [], []
        for side, core in (("lokr_w1", "lokr_t1"), ("lokr_w2", "lokr_t2")):
            if side in self._tensors:
                factors = (self._matrix(side),)
            else:
                factors = self._pair(side, core)
                ranks.append(len(factors[1]))
                if not _product_shape(*factors):
                    raise self._misfit((), f"{side}_a", f"{side}_b")
            sides.append(factors)
            shapes.append((len(factors[0]), factors[-1].shape[1]))
        (o1, i1), (o2, i2) = shapes
        self._check_fit((o1 * o2, i1 * i2), *(role for role in self._tensors if role.startswith("lokr_")))
        self.kinds.add("LoKr")
        if ranks:
            strength = self._strength(ranks[-1])
        elif "alpha" in self._tensors:
            strength = 1.0  # LyCORIS writes an alpha beside whole matrices, and does not use it
        else:
            strength = self._adapter.strength(self._names, None, None)
        return [Kronecker(part.start, part.height, *sides, part.source, strength) for part in self._layer.parts]

    def _decomposed(self, parts: list[tuple[str, Delta]]) -> Iterator[tuple[str, Delta]]:
        magnitude = self._read("magnitude")
        out, columns = self._layer.shape
        if magnitude.ndim > 1 and magnitude.flatten(1).shape == (1, columns):
            magnitude = magnitude.flatten(1)
            for name, delta in parts:
                yield name, Decomposed(delta.start, delta.height, delta, magnitude, tuple(parts))
        else:
            size = magnitude.numel()
            self._check_fit((size, columns) if magnitude.shape[:1].numel() == size else (), "magnitude")
            magnitude = magnitude.reshape(out, 1)
            for part, (name, delta) in zip(self._layer.parts, parts, strict=True):
                yield name, Decomposed(delta.start, delta.height, delta, _rows(magnitude, part))

    def _whole(self, role: str, make: Callable[..., Delta]) -> Iterator[tuple[str, Delta]]:
        """A tensor of the weight's or the bias's own shape."""
        bias = role in ("diff_b", "value_b", "up_bias")
        if bias and not self._layer.biased:
            raise ValueError(f"The LoRA has {self._name(role)}, but {self._layer} has no bias.")
        tensor = self._read(role)
        if not bias and tensor.ndim > 2:
            tensor = self._matrix(role)
        if tensor.shape != (self._layer.shape[:1] if bias else self._layer.shape):
            raise self._misfit(tensor.shape, role)
        for part in self._layer.parts:
            name = f"{part.name}.{'bias' if bias else 'weight'}"
            yield name, make(part.start, part.height, _rows(tensor, part))

    def _up_bias(self, start: int, height: int, bias: Tensor) -> Delta:
        return Full(start, height, bias, self._strength(len(self._pair_of_factors()[1])))

    def _pair(self, side: str, core: str) -> tuple[Tensor, Tensor]:
        """[out, rank] and [rank, in]; with a core, LyCORIS stores the first transposed."""
        a, b = self._matrix(f"{side}_a"), self._matrix(f"{side}_b")
        return (a.T, self._tucker(core, b)) if core in self._tensors else (a, b)

    def _tucker(self, core: str, down: Tensor) -> Tensor:
        """A core times the next factor; it must be [rank, rank], or small files could take any amount of memory."""
        if core not in self._tensors:
            return down
        matrix = self._matrix(core)
        if matrix.shape != (len(down), len(down)):
            raise self._misfit((), core)
        return matrix.float() @ down.float()

    def _strength(self, rank: int) -> float:
        if rank == 0:
            raise ValueError(f"The LoRA's factors for {self._layer} have rank 0.")
        self.ranks.add(rank)
        alpha = None
        if "alpha" in self._tensors:
            tensor = self._read("alpha")
            if tensor.numel() != 1:
                raise ValueError(f"{self._name('alpha')} is {_size(tensor.shape)}; it must be one number.")
            alpha = tensor.item()
        strength = self._adapter.strength(self._names, rank, alpha)
        if abs(strength) > MAX_STRENGTH:
            raise ValueError(
                f"The LoRA's factors for {self._layer} have the strength {strength:g}; none is above {MAX_STRENGTH:g}."
            )
        return strength

    def _matrix(self, role: str) -> Tensor:
        """A matrix, which some tools store as the kernel of a 1x1 convolution."""
        tensor = self._read(role)
        if tensor.ndim < 2 or len(self._layer.shape) != 2:
            raise self._misfit(tensor.shape, role)
        return tensor.flatten(1)

    def _read(self, role: str) -> Tensor:
        if role not in self._tensors:
            raise self._incomplete(role)
        self._used.add(role)
        name = self._tensors[role]
        tensor = self._get(name)
        if max(tensor.shape, default=0) > MAX_DIMENSION:
            raise ValueError(
                f"{short(name)} is {_size(tensor.shape)}; a LoRA for FLUX.1 has no tensor that is longer or wider than "
                f"{MAX_DIMENSION}."
            )
        if tensor.dtype not in FLOATS and not (role == "alpha" and tensor.dtype in INTEGERS):
            raise ValueError(
                f"{short(name)} is stored as {str(tensor.dtype).removeprefix('torch.')}; it must be a float type."
            )
        if tensor.dtype in FLOATS and tensor.itemsize == 1:
            tensor = tensor.to(torch.bfloat16)  # exact: bfloat16 has more bits of each kind
        elif tensor.dtype == torch.float64:
            tensor = tensor.float()
        for piece in tensor.flatten().split(PIECE):
            check_cancelled()
            if not piece.isfinite().all():
                raise ValueError(f"{short(name)} has values that are not finite numbers; the file is damaged.")
        return tensor

    def _name(self, role: str) -> str:
        return short(self._tensors[role])

    def _incomplete(self, role: str) -> ValueError:
        return ValueError(f"The LoRA is incomplete: {short(self._names[0])} lacks its counterpart of {role}.")

    def _check_fit(self, shape: tuple[int, ...], *roles: str) -> None:
        if shape != self._layer.shape:
            raise self._misfit(shape, *roles)

    def _misfit(self, shape: tuple[int, ...], *roles: str) -> ValueError:
        """The error about a change of another shape than the layer's; () where factors do not fit each other."""
        expected = self._layer.shape
        if self._layer.parts[0].name == "x_embedder" and len(shape) == 2 and shape[1] > expected[1]:
            return ValueError(
                f"{WIDER.get(shape[1] / expected[1], OTHER_INPUT)}: it widens the image input from {expected[1]} to "
                f"{shape[1]} channels."
            )
        shapes = {role: self._get(self._tensors[role]).shape for role in roles}
        given = " and ".join(f"{self._name(role)} is {_size(shape)}" for role, shape in shapes.items())
        return ValueError(f"The LoRA does not fit: {given}, but {self._layer} is {_size(expected)}.")


def _product_shape(left: Tensor, right: Tensor) -> tuple[int, ...]:
    """Of left @ right; () where they do not fit each other."""
    return (len(left), right.shape[1]) if left.shape[1] == len(right) else ()


def _rows(tensor: Tensor, part: Part) -> Tensor:
    return tensor[part.source : part.source + part.height]


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"
