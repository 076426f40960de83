"""The languages besides Python: how a program is compiled and run, and what of it is installed.

A table and the search for its executables, not the running (`inside.execute`). Python is no row:
its programs are forked from the warm zygote. Where a language has several rows, the first whose
executables are all found is taken.
"""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

OUT = "out"
"""Where compilers write, below the folder of the source; all that travels to the tests."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin"
_PROBE_SECONDS = 20.0
_SYSTEM = ("/usr/", "/bin/", "/sbin/", "/lib/", "/lib64/")
_CONFIGURATION = (
    "/etc/alternatives", "/etc/java-*", "/etc/mono", "/etc/php/*/cli", "/etc/php/*/mods-available"
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """One way to run one language.

    Commands are templates: `{gcc}` is the path of an executable in `needs`, `{memory}` the MiB a
    program may use, `{main}` the Java class, `{source}` the file, `{home}` the test's own folder.

    address_space: whether RLIMIT_AS bounds memory. It cannot where a runtime reserves far more
        than it uses: there RLIMIT_DATA does, which counts writable private pages only, and
        the runtime's own flag where it has one.
    spare_mib: what a runtime needs on top of the program's memory.
    own_proc: whether it needs /proc, which only a pid namespace of its own makes harmless.
    threads: what a runtime starts by itself, on top of the program's processes.
    beside: files that lie beside the source when it is compiled.
    oldest: refuse a first executable of a lower version.
    oom_marks: what the runtime writes to stderr when memory is short. A candidate can write that
        too: it only tells one failing verdict from another.
    """

    language: str
    source: str
    needs: tuple[str, ...]
    install: str
    run: tuple[str, ...]
    compile: tuple[str, ...] = ()
    version: tuple[str, ...] = ("--version",)
    oldest: tuple[int, int] = (0, 0)
    address_space: bool = False
    spare_mib: int = 0
    own_proc: bool = False
    threads: int = 0
    environment: tuple[tuple[str, str], ...] = ()
    beside: tuple[tuple[str, str], ...] = ()
    compile_seconds: float = 30.0
    oom_marks: tuple[str, ...] = ()


_NODE_FLAGS = ("--max-old-space-size={memory}",)  # bounds the heap; RLIMIT_DATA the rest
_NODE = Runner(
    language="javascript",
    source="main.js",
    needs=("node",),
    install="nodejs",
    run=("{node}", *_NODE_FLAGS, "{source}"),
    spare_mib=256,
    threads=32,
    # Node gives up if a configuration is there that it may not read.
    environment=(("OPENSSL_CONF", "/dev/null"),),
    oom_marks=("JavaScript heap out of memory", "Array buffer allocation failed"),
)
_TYPESCRIPT_INSTALL = "nodejs npm, then `npm install -g typescript`"
# Serial and without the shared-memory file of jstat: fewer threads, nothing written to /tmp.
_JVM_FLAGS = ("-XX:+UseSerialGC", "-XX:-UsePerfData", "-XX:ReservedCodeCacheSize=64m")
# tsc checks types, so it must have heard of Node's names; as a module, a program may redefine them.
_NODE_TYPES = """declare var require: any, module: any, exports: any, process: any, Buffer: any;
declare var console: any, globalThis: any, __dirname: string, __filename: string;
declare var performance: any, TextDecoder: any, TextEncoder: any, URL: any;
declare function setTimeout(f: any, ms?: number, ...rest: any[]): any;
declare function setInterval(f: any, ms?: number, ...rest: any[]): any;
declare function setImmediate(f: any, ...rest: any[]): any;
declare function clearTimeout(id: any): void;
declare function clearInterval(id: any): void;
declare function queueMicrotask(f: () => void): void;
declare function structuredClone<T>(value: T): T;
declare module "*";
declare namespace NodeJS { type ErrnoException = any; type Timeout = any; }
"""
_TSC_FLAGS = (
    "--target", "es2022", "--lib", "es2022", "--module", "commonjs", "--moduleDetection", "force",
    "--esModuleInterop", "--skipLibCheck", "--types", "", "--pretty", "false", "--outDir", OUT,
)  # fmt: skip
_CPP_OOM = ("std::bad_alloc",)

RUNNERS = (
    _NODE,
    replace(
        _NODE,
        language="typescript",
        source="main.ts",
        needs=("tsc", "node"),
        install=_TYPESCRIPT_INSTALL,
        compile=("{node}", *_NODE_FLAGS, "{tsc}", *_TSC_FLAGS, "{source}", "node.d.ts"),
        run=("{node}", *_NODE_FLAGS, "main.js"),
        beside=(("node.d.ts", _NODE_TYPES),),
    ),
    replace(  # types are stripped, not checked
        _NODE,
        language="typescript",
        source="main.ts",
        oldest=(22, 7),
        install=_TYPESCRIPT_INSTALL,
        run=("{node}", *_NODE_FLAGS, "--experimental-transform-types", "--no-warnings", "{source}"),
    ),
    Runner(
        language="bash",
        source="main.sh",
        needs=("bash",),
        install="bash",
        run=("{bash}", "{source}"),
        address_space=True,
        oom_marks=("bash: xmalloc: cannot allocate", "bash: xrealloc: cannot allocate"),
    ),
    Runner(
        language="c",
        source="main.c",
        needs=("gcc",),
        install="gcc libc6-dev",
        compile=("{gcc}", "-O2", "-std=gnu17", "-o", f"{OUT}/main", "{source}", "-lm"),
        run=("./main",),
        address_space=True,
    ),
    Runner(
        language="cpp",
        source="main.cpp",
        needs=("g++",),
        install="g++",
        compile=("{g++}", "-O2", "-std=gnu++17", "-o", f"{OUT}/main", "{source}"),
        run=("./main",),
        address_space=True,
        oom_marks=_CPP_OOM,
    ),
    Runner(
        language="java",
        source="{main}.java",
        needs=("java", "javac"),
        install="default-jdk-headless",
        compile=(
            "{javac}", *(f"-J{flag}" for flag in _JVM_FLAGS), "-J-Xmx{memory}m", "-encoding",
            "UTF-8", "-nowarn", "-proc:none", "-d", OUT, "{source}",
        ),
        run=("{java}", *_JVM_FLAGS, "-Xmx{memory}m", "-cp", ".", "{class}"),
        version=("-version",),
        spare_mib=384,  # code cache, metaspace, the stacks of the JVM's own threads
        threads=48,
        compile_seconds=60.0,
        oom_marks=("java.lang.OutOfMemoryError",),
    ),
    Runner(
        language="go",
        source="main.go",
        needs=("go",),
        install="golang-go",
        compile=("{go}", "build", "-o", f"{OUT}/main", "{source}"),
        run=("./main",),
        version=("version",),
        spare_mib=128,
        threads=32,
        environment=(
            ("GOCACHE", "{home}/.cache"), ("GOPATH", "{home}/.go"), ("GOPROXY", "off"),
            ("GOTOOLCHAIN", "local"), ("GO111MODULE", "off"), ("CGO_ENABLED", "0"),
            ("GOTELEMETRY", "off"),
        ),
        compile_seconds=120.0,  # since Go 1.20 the standard library is compiled along, every time
        oom_marks=("fatal error: runtime: out of memory", "runtime: cannot allocate memory"),
    ),
    Runner(
        language="php",
        source="main.php",
        needs=("php",),
        install="php-cli",
        run=(
            "{php}", "-d", "memory_limit={memory}M", "-d", "display_errors=stderr", "{source}",
        ),
        address_space=True,
        spare_mib=128,
        oom_marks=("Allowed memory size of",),
    ),
    Runner(
        language="csharp",
        source="main.cs",
        needs=("mono", "mcs"),
        install="mono-mcs mono-runtime",
        compile=("{mcs}", "-optimize+", "-r:System.Numerics", f"-out:{OUT}/main.exe", "{source}"),
        run=("{mono}", "main.exe"),
        spare_mib=256,
        threads=32,
        own_proc=True,
        environment=(("MONO_DISABLE_SHARED_AREA", "1"),),
        oom_marks=("System.OutOfMemoryException",),
    ),
    Runner(
        language="rust",
        source="main.rs",
        needs=("rustc", "gcc"),
        install="rustc gcc",
        compile=(
            "{rustc}", "-O", "--edition", "2021", "-C", "linker={gcc}", "-C", "strip=symbols",
            "-o", f"{OUT}/main", "{source}",
        ),
        run=("./main",),
        threads=32,
        spare_mib=64,
        compile_seconds=60.0,
        oom_marks=("memory allocation of",),
    ),
)  # fmt: skip

LANGUAGES = ("python", *dict.fromkeys(runner.language for runner in RUNNERS))


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A runner whose executables are here.

    tools: their real paths by name. folders: what must be readable for them beyond the system's
    own folders.
    """

    runner: Runner
    tools: Mapping[str, str]
    folders: tuple[str, ...]


@functools.cache
def find(
    path: str | None = None, as_nobody: bool = False, own_proc: bool = True
) -> dict[str, Toolchain]:
    """The toolchains on this machine by language, without Python.

    path: where to search, as in PATH (None: the usual places). as_nobody: only those that every
    user may reach. own_proc: whether tests will have a /proc.
    """
    found: dict[str, Toolchain] = {}
    for runner in RUNNERS:
        tools = {name: _locate(name, path or _PATH) for name in runner.needs}
        located = {name: tool for name, tool in tools.items() if tool is not None}
        if runner.language in found or len(located) < len(tools):
            continue
        if runner.own_proc and not own_proc:
            continue
        if as_nobody and not all(_reachable(tool) for tool in located.values()):
            continue
        if any(runner.oldest) and _number(version_of(located[runner.needs[0]])) < runner.oldest:
            continue
        folders = {folder for tool in located.values() for folder in _folders(tool)}
        found[runner.language] = Toolchain(runner, located, tuple(sorted(folders)))
    return found


def configuration() -> list[str]:
    """What toolchains read of /etc: which alternative is chosen, settings of the JVM and PHP."""
    return sorted(str(path) for rule in _CONFIGURATION for path in Path("/").glob(rule[1:]))


def advice(language: str) -> str:
    """One line for a language of the table that is not installed."""
    runner = next(runner for runner in RUNNERS if runner.language == language)
    needs = " and ".join(runner.needs)
    level = ", and use the namespace level" if runner.own_proc else ""
    return f"language {language!r}: no {needs} within reach; install {runner.install}{level}"


def versions(path: str | None = None) -> dict[str, str]:
    """The first executable's version for each language found, for people."""
    return {
        name: version_of(found.tools[found.runner.needs[0]], *found.runner.version)
        for name, found in find(path).items()
    }


@functools.cache
def version_of(tool: str, *arguments: str) -> str:
    """The first dotted number that `tool` says of itself, or "unknown version"."""
    done = _ask([tool, *(arguments or ("--version",))])
    match = re.search(rb"\d+(\.\d+)+", done.stdout + done.stderr) if done is not None else None
    return match.group().decode() if match else "unknown version"


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[bytes] | None:
    """What a tool says of itself; None if it cannot be started or does not end in time."""
    try:
        return subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            cwd="/",
            timeout=_PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _locate(name: str, path: str) -> str | None:
    """The real path: links through folders that a jail does not have would be broken there."""
    tool = shutil.which(name, path=path)
    if tool is None:
        return None
    real = os.path.realpath(tool)
    if os.path.basename(real) == "rustup":  # a proxy that would look into the home directory
        return _behind_rustup(tool, name)
    return real


def _behind_rustup(proxy: str, name: str) -> str | None:
    done = _ask([proxy, "--print", "sysroot"])
    if done is None:
        return None
    tool = os.path.join(os.fsdecode(done.stdout).strip(), "bin", name)
    return tool if os.path.isfile(tool) else None


def _folders(tool: str) -> tuple[str, ...]:
    """The installation that `tool` belongs to; nothing for those of the system.

    Never a home directory or what lies right below it: those hold more than a toolchain.
    """
    if tool.startswith(_SYSTEM):
        return ()
    folder = Path(tool).parent
    prefix = folder.parent
    home = Path.home()
    private = prefix == home or prefix in home.parents or prefix.parent == home
    return (str(folder if folder.name != "bin" or private else prefix),)


def _reachable(tool: str) -> bool:
    return all(os.stat(folder).st_mode & 0o001 for folder in (tool, *map(str, Path(tool).parents)))
