"""Report on the house: its wings and their imports, long files, docstrings and English. Nothing is changed.

    python tests/house.py    # or: make house

tests/test_wings.py and tests/test_house.py check the counts that must be zero. The others are for the reader.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = ("d3ds2", "nodes", "training", "benchmarks", "docs/examples", "tests")
PAGES = ("docs", "web", ".github")
LONGEST = 400  # lines of a file

NETWORKS = ("networks", "layers", "geometry", "kernels")
MAY_IMPORT = {  # wing -> the other wings it may import; d3ds2 stands for the modules at its top, such as pipeline
    "d3ds2/kernels": (),
    "d3ds2/geometry": ("kernels",),
    "d3ds2/layers": ("geometry", "kernels"),
    "d3ds2/networks": (*NETWORKS, "storage"),
    "d3ds2/storage": (),
    "d3ds2/meshes": ("storage",),
    "d3ds2/images": ("storage",),
    "d3ds2/official": (*NETWORKS, "storage"),
    "d3ds2": (*NETWORKS, "storage", "meshes", "images", "official"),
    "nodes": (*NETWORKS, "storage", "meshes", "images", "d3ds2"),
    "training": (*NETWORKS, "storage", "meshes", "images", "d3ds2"),
    "benchmarks": (*NETWORKS, "storage", "meshes", "images", "d3ds2", "training", "tests"),
}

BANNED = {
    name: re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)
    for name, pattern in {
        "anew": "anew",
        "in the place of": "in the place of",
        "at hand": "at hand",
        "of which": "of which",
        "one a X": r"one an? (?!time\b)[a-z]+",
        "each once": "each once",
        "as it is/has it": r"as it is(?! [a-z]+ed\b)|has it",  # "as soon as it is submitted" is plain English
        "told": "told",
        "that mended": "that mended",
    }.items()
}
SIZE = r"[\w³² +*/·×.'-]+"
# (N, C), (B + 1,); one size must be a letter or a number, or the only one
SHAPE = re.compile(rf"\((?:{SIZE},)+(?:{SIZE})?\)")
ANY_SHAPE = re.compile(r"\bany shapes?\b")
ARRAYS = re.compile(r"\bTensor\b|\bndarray\b")
ARRAY_WINGS = ("d3ds2", "nodes", "training", "benchmarks", "docs/examples")  # whose docstrings give shapes and errors
DEVICE_QUESTIONS = re.compile(
    r"""\bis_c(uda|pu)\b|\bHAS_TRITON\b|find_spec\(["']triton["']\)|\.type (?:[!=]=|in|not in) ["'(]"""
)
HIDDEN_STATE = re.compile(r"__dict__|object\.__new__")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*tops: str) -> list[Path]:
    """The modules under these folders, by default under all in PYTHON."""
    found = [path for top in tops or PYTHON for path in sorted((ROOT / top).rglob("*.py"))]
    return [path for path in found if "__pycache__" not in path.parts]


def pages() -> list[Path]:
    """The Markdown files."""
    return sorted(ROOT.glob("*.md")) + [path for top in PAGES for path in sorted((ROOT / top).rglob("*.md"))]


def name(path: Path) -> str:
    """The path from the root, with slashes."""
    return path.relative_to(ROOT).as_posix()


# wings


def wing_of(path: Path) -> str:
    """The wing of a module: `d3ds2/kernels` or `nodes`; `d3ds2` for a module at its top."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2]) if parts[0] == "d3ds2" and len(parts) > 2 else parts[0]


def modules_of(wing: str) -> list[Path]:
    """The modules of a wing."""
    return [path for path in python_files(wing) if wing_of(path) == wing]


def imported_wings(path: Path) -> list[tuple[int, str]]:
    """Return line and wing of every import within the project, those inside functions included."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = (*start, *(node.module.split(".") if node.module else ()))
            imported = [(*module, alias.name) for alias in node.names]
        else:
            continue
        for parts in imported:
            if parts[0] == "d3ds2":
                inside = len(parts) > 1 and (ROOT / "d3ds2" / parts[1]).is_dir()
                found.append((node.lineno, parts[1] if inside else "d3ds2"))
            elif parts[0] in ("nodes", "training", "benchmarks", "tests"):
                found.append((node.lineno, parts[0]))
    return found


def upward_imports(wing: str) -> list[str]:
    """The imports of a wing from wings that it may not import, as `file:line imports wing`."""
    allowed = (wing.split("/")[-1], *MAY_IMPORT[wing])
    return [
        f"{name(path)}:{line} imports {other}"
        for path in modules_of(wing)
        for line, other in imported_wings(path)
        if other not in allowed
    ]


# files and text


def long_files() -> list[str]:
    """The modules above LONGEST lines, as `file: lines`."""
    lines = {path: len(path.read_text().splitlines()) for path in python_files()}
    return [f"{name(path)}: {count}" for path, count in lines.items() if count > LONGEST]


def matches(pattern: re.Pattern, paths: list[Path]) -> list[str]:
    """The lines in which a pattern is found, as `file:line  text`."""
    return [
        f"{name(path)}:{number}  {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


def banned_words() -> dict[str, list[str]]:
    """Return the lines with each of the BANNED words, in all modules but this one and in the Markdown files."""
    paths = [path for path in (*python_files(), *pages()) if path != Path(__file__)]
    return {word: matches(pattern, paths) for word, pattern in BANNED.items()}


def device_questions() -> list[str]:
    """The lines outside d3ds2/kernels which ask for the kind of a device, or whether Triton or a GPU is there."""
    outside = [path for path in python_files("d3ds2", "nodes", "training") if wing_of(path) != "d3ds2/kernels"]
    return matches(DEVICE_QUESTIONS, outside)


def hidden_state() -> list[str]:
    """The lines of d3ds2/geometry which write around a frozen class."""
    return matches(HIDDEN_STATE, python_files("d3ds2/geometry"))


def kernels_without_definition() -> list[str]:
    """The `*_triton.py` files whose docstring names no existing file with their definition."""
    return [name(path) for path in python_files("d3ds2") if path.stem.endswith("_triton") and not _has_definition(path)]


def _has_definition(path: Path) -> bool:
    """Whether a sentence of the docstring has "definition" and a file, whose path is relative to this one or d3ds2."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    sentences = [sentence for sentence in re.split(r"[.;] ", text) if "definition" in sentence]
    files = [file for sentence in sentences for file in re.findall(r"[\w./]+\.py\b", sentence)]
    return any((folder / file).is_file() for file in files for folder in (path.parent, ROOT / "d3ds2"))


# docstrings


def docstrings_beginning_with(*words: str) -> list[str]:
    """The docstrings whose first word is one of these, as `file:line  first line`."""
    found = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | Function):
                continue
            text = ast.get_docstring(node) or ""
            if text.split(maxsplit=1)[:1] and text.split(maxsplit=1)[0].rstrip(",:") in words:
                found.append(f"{name(path)}:{getattr(node, 'lineno', 1)}  {text.splitlines()[0]}")
    return found


def public_functions(path: Path) -> Iterator[tuple[str, Function, str]]:
    """Yield qualified name, node and docstring of a module's public functions and methods, except Triton kernels.

    The docstring of its class counts as a method's own, because an `nn.Module` says there what `forward` takes.
    """

    def walk(body: list[ast.stmt], prefix: str, above: str) -> Iterator[tuple[str, Function, str]]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from walk(node.body, f"{node.name}.", ast.get_docstring(node) or "")
            elif isinstance(node, Function) and (not node.name.startswith("_") or node.name == "__init__"):
                decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
                if "jit" not in decorators and "overload" not in decorators:
                    yield prefix + node.name, node, f"{above}\n{ast.get_docstring(node) or ''}"

    yield from walk(ast.parse(path.read_text()).body, "", "")


def without_shapes() -> list[str]:
    """The public functions which take tensors or arrays and whose docstring gives no shape.

    A docstring may name a function whose docstring does, see `refers_to_shapes`.
    """
    public = {path: list(public_functions(path)) for path in python_files(*ARRAY_WINGS)}
    by_wing: dict[str, list[tuple[str, Function, str]]] = {}
    for path, functions in public.items():
        by_wing.setdefault(wing_of(path), []).extend(functions)
    return [
        f"{name(path)}:{node.lineno}  {function}"
        for path, functions in public.items()
        for function, node, text in functions
        if array_names(node) and not _gives_shape(text)
        if not refers_to_shapes(function, node, by_wing[wing_of(path)])
    ]


def without_raises() -> list[str]:
    """The public functions that raise ValueError themselves, but whose docstring does not say so."""
    return [
        f"{name(path)}:{node.lineno}  {function}"
        for path in python_files(*ARRAY_WINGS)
        for function, node, text in public_functions(path)
        if _raises_value_error(node) and not re.search(r"\bRaises?\b.*\bValueError\b", text, re.DOTALL)
    ]


def refers_to_shapes(function: str, node: Function, wing: list[tuple[str, Function, str]]) -> bool:
    """Whether the first sentence names, in backticks, a function of the wing with the same arrays and their shapes.

    The name must belong to one public function there, or to a method of the same class. That function's own docstring
    must give shapes, and every parameter of this one that is an array must be one there, under the same name.
    """
    first = re.split(r"[.:;]\s", " ".join((ast.get_docstring(node) or "").split()) + " ")[0]
    owner = function.rpartition(".")[0]
    for word in re.findall(r"`(\w+)`", first):
        methods = [each for each in wing if owner and each[0] == f"{owner}.{word}"]
        named = methods or [each for each in wing if each[0] == word]
        if len(named) != 1 or named[0][1] is node:
            continue
        (_, other, _), *_ = named
        if _gives_shape(ast.get_docstring(other) or "") and array_names(node) <= array_names(other):
            return True
    return False


def array_names(node: Function) -> set[str]:
    """The parameters that are annotated as tensors or arrays, or as lists or tuples of them."""
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    annotations = {each.arg: ast.unparse(each.annotation) for each in arguments if each.annotation}
    return {each for each, text in annotations.items() if ARRAYS.search(text) and not re.search("Callable|dict", text)}


def _gives_shape(text: str) -> bool:
    text = " ".join(text.split())
    sizes = any(re.search(r"\b[A-Z][a-z]?\b|\d|\.\.\.|^\([^,]+,\)$", shape) for shape in SHAPE.findall(text))
    return sizes or bool(ANY_SHAPE.search(text))


def _raises_value_error(node: Function) -> bool:
    raised = [ast.unparse(each.exc) for each in ast.walk(node) if isinstance(each, ast.Raise) and each.exc]
    return any(error.startswith("ValueError") for error in raised)


# the report


def report() -> Iterator[str]:
    """Yield the lines of the report."""
    yield "Modules per wing"
    for wing in MAY_IMPORT:
        yield f"  {wing:16} {len(modules_of(wing)):4}"
    yield ""
    yield from _import_table()
    yield ""
    yield from _section("Imports upward", [line for wing in MAY_IMPORT for line in upward_imports(wing)])
    yield from _section(f"Files above {LONGEST} lines", long_files())
    yield from _section("Kernel files which name no definition", kernels_without_definition())
    yield from _section("Questions about Triton or the GPU outside d3ds2/kernels", device_questions())
    yield from _section("Hidden state in d3ds2/geometry", hidden_state())
    yield from _section('Docstrings beginning with "What" or "Of"', docstrings_beginning_with("What", "Of"))
    for word, lines in banned_words().items():
        yield from _section(f'"{word}"', lines)
    yield from _section("Public functions on arrays without a shape in the docstring", without_shapes())
    yield from _section("Public functions raising ValueError without saying so", without_raises())


def _import_table() -> Iterator[str]:
    """Yield a row for each wing, with the number of its imports from every other."""
    names = [wing.split("/")[-1] for wing in MAY_IMPORT]
    columns = [*names[:-1], "tests"]
    yield "Imports: a row's wing imports from a column's"
    yield " " * 12 + "".join(f"{column:>11}" for column in columns)
    for wing, own in zip(MAY_IMPORT, names, strict=True):
        counts = Counter(other for path in modules_of(wing) for _, other in imported_wings(path))
        yield f"  {own:10}" + "".join(f"{'·' if column == own else counts[column] or '':>11}" for column in columns)


def _section(title: str, lines: list[str]) -> Iterator[str]:
    yield f"{title}: {len(lines) or 'none'}"
    yield from (f"  {line}" for line in lines)


if __name__ == "__main__":
    print("\n".join(report()))
