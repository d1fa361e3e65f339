"""The build's table of what each kernel uses: registers, shared memory, stack and spills, from what ptxas said.

    python setup_tools/resources.py --json FILE OBJECT...

Reads OBJECT.ptxas beside each object file (csrc/kernels/log_resources.sh writes it), prints a row a kernel and writes
the same as JSON, which is installed beside pgolf._kernels: tests/test_kernel_resources.py reads it there. Needs the
standard library alone, since the build runs it.
"""

import argparse
import json
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
FUNCTION = re.compile(r"Function properties for (\S+)")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
REMARK = re.compile(r"ptxas info\s*: (\(C\d+\) .*?) in (?:the )?function '(\S+)'")


@dataclass
class Kernel:
    """One kernel, or a device function that was not inlined (0 registers: its callers' count them), on one `arch`."""

    file: str  # below csrc/kernels
    name: str
    arch: str
    registers: int = 0  # a thread
    shared: int = 0  # bytes a block, static; what a launch adds is not known here
    stack: int = 0  # bytes a thread
    spilled: int = 0  # bytes a thread, stores and loads
    remarks: list[str] = field(default_factory=list)  # ptxas': such as wgmma instructions run one by one


def demangled(names: list[str]) -> dict[str, str]:
    """Readable names, without types of parameters and namespaces of ours; as they are where there is no c++filt."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    ran = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: shortened(long) for name, long in zip(names, ran.stdout.splitlines(), strict=True)}


def shortened(name: str) -> str:
    """`void a::(anonymous namespace)::kernel<float, 4>(Params)` as `kernel<float, 4>`, within pgolf's namespaces."""
    name = name.replace("(anonymous namespace)::", "")
    if name.endswith(")"):
        depth = 0
        for index in range(len(name) - 1, -1, -1):
            depth += (name[index] == ")") - (name[index] == "(")
            if not depth:
                name = name[:index]
                break
    return re.sub(r"\bpgolf::(?:generic::|sm90::)?", "", name).removeprefix("void ")


def parse(text: str, file: str) -> list[Kernel]:
    """The kernels of one log, names mangled."""
    found: list[Kernel] = []
    remarks: dict[str, list[str]] = {}  # by function; they come before it, and name no architecture
    entry = current = Kernel(file, "", "")
    for line in text.splitlines():
        if match := COMPILING.search(line):
            entry = current = Kernel(file, match[1], match[2])
            found.append(entry)
        elif match := FUNCTION.search(line):
            current = entry
            if match[1] != entry.name:
                current = Kernel(file, match[1], entry.arch)
                found.append(current)
        elif match := STACK.search(line):
            current.stack, current.spilled = int(match[1]), int(match[2]) + int(match[3])
        elif match := REGISTERS.search(line):
            entry.registers = int(match[1])
            entry.shared = int(shared[1]) if (shared := SHARED.search(line)) else 0
        elif match := REMARK.search(line):
            remarks.setdefault(match[2], []).append(match[1])
    for kernel in found:
        kernel.remarks = remarks.get(kernel.name, [])
    return found


def read(objects: list[Path]) -> list[Kernel]:
    """The kernels of all object files, sorted, names readable."""
    kernels: list[Kernel] = []
    for path in objects:
        log = path.with_name(path.name + ".ptxas")
        if not log.is_file():
            raise SystemExit(f"resources: {log} is not there; build from an empty folder")
        file = path.as_posix().rpartition("/csrc/kernels/")[2].removesuffix(".o")
        kernels += parse(log.read_text(), file)
    names = demangled([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.name = names[kernel.name]
    return sorted(kernels, key=lambda kernel: (kernel.file, kernel.name, int(re.sub(r"\D", "", kernel.arch))))


def table(kernels: list[Kernel]) -> str:
    """A row a kernel: registers on each architecture, then the most of the rest on any."""
    files: dict[str, dict[str, dict[str, Kernel]]] = {}
    for kernel in kernels:
        files.setdefault(kernel.file, {}).setdefault(kernel.name, {})[kernel.arch] = kernel
    width = 2 + max((len(kernel.name) for kernel in kernels), default=0)
    lines = ["Registers a thread by architecture; static shared memory a block, stack and spills a thread in bytes:"]
    for file, rows in files.items():
        archs = list(dict.fromkeys(arch for by_arch in rows.values() for arch in by_arch))
        head = "".join(f"{arch:>8}" for arch in archs)
        lines.append(f"{file:<{width}}{head}{'shared':>8}{'stack':>7}{'spilled':>9}")
        for name, by_arch in rows.items():
            registers = "".join(f"{by_arch[arch].registers if arch in by_arch else '':>8}" for arch in archs)
            most = [max(getattr(k, what) for k in by_arch.values()) for what in ("shared", "stack", "spilled")]
            lines.append(f"  {name:<{width - 2}}{registers}{most[0]:>8}{most[1]:>7}{most[2]:>9}")
            lines += sorted({f"    {kernel.arch}: {text}" for kernel in by_arch.values() for text in kernel.remarks})
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    parser.add_argument("objects", nargs="*", type=Path, help="object files of the kernels")
    options = parser.parse_args()
    kernels = read(options.objects)
    options.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1) + "\n")
    print(table(kernels))


if __name__ == "__main__":
    main()
