# SPDX-License-Identifier: GPL-2.0
"""The project as files of a kernel tree: what is written where, and how little of it differs.

Sources are written so that most of them are the same in both places. In the kernel `bindings`, `device_mapper`,
`lower_read` and `codec` are modules of the `kernel` crate, and here of each target. What follows from that is done
here, on text that rustfmt has formatted: a line is a name of a list, and an item ends where its indentation does.
"""

import re

from cache import SOURCE

RUST = SOURCE / "rust"
UPSTREAM = SOURCE / "upstream"
# The modules of the `kernel` crate that a target names at its root.
CRATE_MODULES = ("codec", "device_mapper", "lower_read")
TARGETS = {"dm-overlaybd": "overlaybd", "dm-zfile": "zfile"}
DRIVERS = "drivers/md/dm-overlaybd"
MANUALS = "Documentation/admin-guide/device-mapper"
# Helpers of which only modules outside of the kernel tree have a use.
OUTSIDE = {"dm_register_target"}


class Tree:
    """A kernel tree, or the part of it that the series touches."""

    def __init__(self, directory, author):
        self.directory = directory
        # As `name <address>`.
        self.author = author
        makefile = self.read("Makefile")
        self.version = tuple(int(re.search(rf"^{name} = (\d+)$", makefile, re.MULTILINE)[1])
                             for name in ("VERSION", "PATCHLEVEL"))

    def read(self, path):
        return (self.directory / path).read_text()

    def write(self, path, text):
        file = self.directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def insert(self, path, line, like):
        """Puts a line among those that match `like`, in alphabetical order; one that is there stays alone."""
        lines = self.read(path).splitlines()
        if line in lines:
            return
        among = [number for number, other in enumerate(lines) if re.match(like, other)]
        place = next((number for number in among if _key(lines[number]) > _key(line)), among[-1] + 1)
        lines.insert(place, line)
        self.write(path, "\n".join(lines) + "\n")

    def add_maintainers(self, name):
        """Adds an entry to MAINTAINERS. Whoever posts a series maintains what it adds."""
        entry = (UPSTREAM / name).read_text().replace("\nL:", f"\nM:\t{self.author}\nL:", 1)
        self.append("MAINTAINERS", entry + "\n", "DEVICE-MAPPER PCACHE TARGET")

    def append(self, path, text, before):
        """Puts text in front of the line that is `before`."""
        content = self.read(path)
        if text not in content:
            head, _, tail = content.partition(f"\n{before}\n")
            self.write(path, f"{head}\n{text}{before}\n{tail}")


def _key(line):
    """Directories come after files of the same name, as the kernel has it."""
    return line.replace("/", "\0").lower()


def item_end(lines, first):
    """The line after the item or statement that begins at a line."""
    margin = lines[first][:len(lines[first]) - len(lines[first].lstrip())]
    number = first
    while lines[number].lstrip().startswith(("#[", "//")):
        number += 1
    if not lines[number].rstrip().endswith((";", "{}")):
        while not re.fullmatch(margin + r"[})\]]+[;,]?", lines[number]):
            number += 1
    number += 1
    # The blank line goes with the item.
    if number < len(lines) and not lines[number] and (first == 0 or not lines[first - 1]):
        number += 1
    return number


def without_item(text, header):
    """The text without the item that begins so, its documentation and attributes."""
    lines = text.splitlines()
    found = [number for number, line in enumerate(lines) if line.lstrip().startswith(header)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} items begin with {header!r}")
    first = found[0]
    while first and lines[first - 1].lstrip().startswith(("///", "#[")):
        first -= 1
    del lines[first:item_end(lines, first)]
    return "\n".join(lines) + "\n"


def without_names(text, names):
    """The text without these names in its lists of imports."""
    names = "|".join(map(re.escape, names))
    text = re.sub(rf"^ *(?:\w+::)?(?:{names})(?:,|, //)?\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^ *(?:pub )?(?:use )?\w+(?:::\w+)*::\{\n *\},?;?\n", "", text, flags=re.MULTILINE)


IMPORT = re.compile(r"^use [^;]*;\n", re.MULTILINE)


def without_idle_imports(text, whole):
    """The text without what it imports for nothing but what `whole` had besides. A trait may not be named anywhere."""
    def named(name, source):
        return re.search(rf"\b{name}\b", IMPORT.sub("", source))

    def pruned(statement):
        result = statement[0]
        for name in set(re.findall(r"\b(\w+)(?=,|;|\}| //)", result)):
            if named(name, whole) and not named(name, text):
                result = re.sub(rf"(?:\b\w+::)*\b{name}\b(?: //|,)? ?", "", result)
        return re.sub(r"\w+::\{\s*\},?", "", result)

    return IMPORT.sub(pruned, text)


def for_version(text, version):
    """Only what this version of the kernel gets, of what `cfg(kernel_since_X_Y)` distinguishes."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        if match := re.fullmatch(r"\s*#\[cfg\((not\()?kernel_since_(\d+)_(\d+)\)+\]", lines[number]):
            since = version >= (int(match[2]), int(match[3]))
            del lines[number:number + 1 if since != bool(match[1]) else item_end(lines, number)]
        else:
            number += 1
    return "\n".join(lines) + "\n"


def crate_form(text, version):
    """A source of the `kernel` crate."""
    text = for_version(text, version)
    # In the crate all is public, its macros are exported, and how to include it elsewhere is not the matter.
    text = re.sub(r"(?:^// .*\n)*^#!\[allow\([^)]*\)\]\n\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"//!\n//! # Use outside of the kernel tree\n(?://!.*\n)*", "", text)
    text = re.sub(r"^pub\(crate\) use (?:\{dm_err[^}]*\}|module_dm);\n\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"^macro_rules! (?=dm_|module_dm)", "#[macro_export]\nmacro_rules! ", text, flags=re.MULTILINE)
    text = re.sub(r"^(?:// .*\n)*pub\(crate\) use self::\{\n    log::\{([^}]*)\},\n    registration::module_dm,\n\};\n",
                  r"pub use crate::{\1module_dm, //\n};\n", text, flags=re.MULTILINE)
    text = "".join(line if line.lstrip().startswith("//") else re.sub(r"(?<![:\w])kernel::", "crate::", line)
                   for line in text.splitlines(keepends=True))
    return text


def target_form(text, version):
    """A source of a target in drivers/md."""
    text = for_version(text, version)
    modules = "|".join(CRATE_MODULES)
    own = re.compile(rf'(?:#\[allow\(unsafe_code\)\]\n)?#\[path = "(?:\.\./)+rust/({modules}|bindings)/mod\.rs"\]\n'
                     r"(?:pub )?mod \w+;\n")
    used = sorted({match[1] for match in own.finditer(text)} - {"bindings"})
    text = own.sub("", text)
    text = re.sub(r'"(?:\.\./)+rust/image/mod\.rs"', '"../image/mod.rs"', text)
    text = text.replace("docs/dm-", f"{MANUALS}/dm-")
    if used:
        names = ",\n    ".join(["prelude::*", *used])
        text = text.replace("use kernel::prelude::*;\n", f"use kernel::{{\n    {names}, //\n}};\n", 1)
    return text


def helper_form(function):
    """A helper as the kernel marks it, which moves the parentheses that its parameters are aligned with."""
    comment, head, parameters, body = re.fullmatch(r"(/\*.*?\*/\n)?([^(]*\()([^{]*)\)\n(\{.*)", function, re.DOTALL).groups()
    lines = ["__rust_helper " + head]
    margin = len(lines[0])
    for parameter in re.split(r",\s*", parameters):
        if len(lines[-1]) + len(parameter) > 98 and not lines[-1].endswith("("):
            lines[-1] = lines[-1].rstrip()
            lines.append("\t" * (margin // 8) + " " * (margin % 8))
        lines[-1] += parameter + ", "
    return (comment or "") + "\n".join(lines).removesuffix(", ") + ")\n" + body


def helpers(tree, sources, path, about):
    """Writes the C helpers that the sources call and no other file of the tree has."""
    wanted = set(re.findall(r"\bbindings::(\w+)", "".join(sources)))
    there = set()
    for other in (tree.directory / "rust/helpers").rglob("*.c"):
        if other != tree.directory / path:
            there |= set(re.findall(r"\brust_helper_(\w+)\(", other.read_text()))
    text = (RUST / "bindings/helpers.c").read_text()
    functions = re.findall(r"^((?:/\*(?:[^*]|\*(?!/))*\*/\n)?[a-z][^\n;]*\brust_helper_(\w+)\([^{;]*\)\n\{\n.*?^\}\n)",
                           text, re.MULTILINE | re.DOTALL)
    chosen = [function for function, name in functions if name in wanted - there - OUTSIDE]
    code = "\n".join(map(helper_form, chosen))
    for definition, name in re.findall(r"^((?:/\*(?:[^*]|\*(?!/))*\*/\n)?static DEFINE_\w+\((\w+)\);\n)", text,
                                       re.MULTILINE):
        if re.search(rf"\b{name}\b", code):
            code = definition + "\n" + code
    code = code.replace("KBUILD_MODNAME", f'"{path.rsplit("/", 1)[1].removesuffix(".c")}"')
    headers = sorted(header for header, used in about.items() if re.search(used, code))
    tree.write(path, "// SPDX-License-Identifier: GPL-2.0\n\n"
               + "".join(f"#include <{header}>\n" for header in headers) + "\n" + code)
    tree.insert("rust/helpers/helpers.c", f'#include "{path.rsplit("/", 1)[1]}"', '#include "')


def bindings(tree, sources, headers):
    """Adds headers to what the kernel crate has bindings for, and the constants that the sources use."""
    path = "rust/bindings/bindings_helper.h"
    for header in headers:
        tree.insert(path, f"#include <{header}>", r"#include <(?!linux/(?:hrtimer_types|acpi|gpu_buddy)|\.\.)")
    wanted = set(re.findall(r"\bbindings::(\w+)", "".join(sources)))
    content = tree.read(path)
    lines = [line for line in (RUST / "bindings/bindings_helper.h").read_text().splitlines()
             if (match := re.match(r"const \w+ RUST_CONST_HELPER_(\w+) = ", line)) and match[1] in wanted
             and f"RUST_CONST_HELPER_{match[1]} " not in content]
    if lines:
        anchor = "const blk_features_t RUST_CONST_HELPER_BLK_FEAT_ROTATIONAL"
        tree.write(path, content.replace(anchor, "\n".join(lines) + "\n" + anchor, 1))


def crate_files(tree, directory):
    """The sources of a module of the crate, by name."""
    return {str(path.relative_to(RUST / directory)): crate_form(path.read_text(), tree.version)
            for path in sorted((RUST / directory).rglob("*.rs"))}


def put_module(tree, name, condition, files=None):
    """Writes a directory of rust/, or files made of it, as a module of the `kernel` crate; returns the sources."""
    files = files or crate_files(tree, name)
    for file, text in files.items():
        tree.write(f"rust/kernel/{name}.rs" if file == "mod.rs" else f"rust/kernel/{name}/{file}", text)
    declared = f"#[cfg({condition})]\npub mod {name};\n"
    library = tree.read("rust/kernel/lib.rs")
    if declared not in library:
        later = next(match for match in re.finditer(r"^(?:#\[cfg\(.*\)\]\n)*pub mod (\w+);\n", library, re.MULTILINE)
                     if match[1] > name)
        tree.write("rust/kernel/lib.rs", library[:later.start()] + declared + library[later.start():])
    return list(files.values())


# What a twin of dm-linear has no use for comes later, with the targets that have: files, items, and names in imports.
LATER_FILES = ["claims.rs", "dax.rs", "limits.rs"]
LATER_CALLBACKS = ["presuspend", "presuspend_undo", "postsuspend", "preresume", "resume", "message", "io_hints",
                   "direct_access", "dax_zero_page_range"]
LATER_ITEMS = [
    *(f"mod {name.removesuffix('.rs')};" for name in LATER_FILES),
    *(f"fn {name}(" for name in LATER_CALLBACKS),
    *(f'unsafe extern "C" fn {name}(' for name in LATER_CALLBACKS),
    *(f"macro_rules! {name}" for name in ("dm_warn", "dm_info", "dm_err_limit", "pass_on")),
    *(f"pub fn {name}(" for name in ("is_readahead", "is_fua", "target_bio_nr", "logical_block_size",
                                     "set_flush_bypasses_map", "set_limit_swap_bios", "set_max_io_len", "may_print",
                                     "dax_device", "require_no_dax",
                                     "visit_without_dax")),
    "pub mod claims;",
    "pub fn module_param<",
    "pub fn accept_partial(",
    "impl From<Result> for BlkStatus",
    # What lower_read uses of them.
    "pub(crate) fn as_raw(&self) -> NonNull<bindings::bio> {",
    "pub(crate) fn ti(&self) -> NonNull<bindings::dm_target> {",
    "pub(crate) unsafe fn queue_on(",
    "pub(crate) use self::per_bio::",
]
LATER_NAMES = ["has_claims", "DaxDevice", "DaxRange", "PAGE_SECTORS", "QueueLimits", "dm_err_limit", "dm_info", "dm_warn", "module_param"]
# Where they are called, and what the documentation says of them.
LATER_WORDS = [
    (r"make memory zero for a file system that writes to it \(`dax_zero_page_range`\)", "take part in DAX"),
    (r"    pass_on!\(.*\);\n\n", ""),
    (rf" +(?:{'|'.join(LATER_CALLBACKS)}): present\(.*\),\n", ""),
    (r"//! new\(\) ---> preresume(?:.*\n)*?//! +drop\(\)\n", "//! new() ---> map(), process(), end_io() ... ---> drop()\n"),
    (r"\[`status`\]\(Target::status\) and\n//! \[`message`\]\(Target::message\)", "[`status`](Target::status)"),
]


def first_forms(files):
    """The files of the abstractions as the first posting has them. Each item is in one of them."""
    whole = files
    files = {name: text for name, text in files.items() if name not in LATER_FILES}
    for header in LATER_ITEMS:
        holders = [name for name, text in files.items()
                   if any(line.lstrip().startswith(header) for line in text.splitlines())]
        for name in holders:
            files[name] = without_item(files[name], header)
    for words, instead in LATER_WORDS:
        holders = [name for name, text in files.items() if re.search(words, text)]
        if len(holders) != 1:
            raise ValueError(f"{len(holders)} files have {words}")
        files[holders[0]] = re.sub(words, instead, files[holders[0]])
    return {name: without_idle_imports(without_names(text, LATER_NAMES), whole[name]) for name, text in files.items()}


DEVICE_MAPPER = 'CONFIG_BLK_DEV_DM = "y"'
# The headers of helpers, by what in their text wants them.
HEADERS = {"asm/cpufeature.h": "boot_cpu_has", "crypto/blake2s.h": "blake2s", "linux/bio.h": r"\bbio\b|bio_vec",
           "linux/blkdev.h": "block_device|bdev_",
           "linux/completion.h": "completion", "linux/dax.h": "dax_device", "linux/device-mapper.h": "dm_target",
           "linux/highmem.h": "kmap|dcache|kunmap|vmap_range", "linux/mempool.h": "mempool", "linux/mutex.h": "mutex",
           "linux/percpu_counter.h": "percpu_counter", "linux/ratelimit.h": "ratelimit",
           "linux/sched.h": r"\bcurrent\b|task_", "linux/slab.h": "kmalloc", "linux/vmalloc.h": "vmalloc",
           "linux/workqueue.h": "workqueue|work_struct"}


def put_bindings(tree):
    used = first_forms(crate_files(tree, "device_mapper")).values()
    bindings(tree, used, ["linux/bio.h", "linux/device-mapper.h"])
    helpers(tree, used, "rust/helpers/device_mapper.c", HEADERS)


def put_abstractions(tree):
    put_module(tree, "device_mapper", DEVICE_MAPPER, first_forms(crate_files(tree, "device_mapper")))
    tree.add_maintainers("MAINTAINERS-1")


def put_tests(tree, module, suite, path):
    """Puts one suite of selftests/dm-kunit at the end of a source of the crate."""
    lines = (SOURCE / "selftests/dm-kunit/dm_kunit.rs").read_text().splitlines()
    first = lines.index(f"mod {module} {{") - 1
    text = "\n".join(["", *lines[first:item_end(lines, first)]]).rstrip("\n") + "\n"
    text = re.sub(r"\n#\[kunit_tests\(\w+\)\]\nmod \w+", f"\n#[macros::kunit_tests({suite})]\nmod tests", text, count=1)
    # What is at the root of that crate is at the root of this one.
    tree.write(path, tree.read(path) + re.sub(r"\b(?:super|kernel)::", "crate::", text))


def put_argument_tests(tree):
    put_tests(tree, "args", "rust_dm_args", "rust/kernel/device_mapper/args.rs")


def put_sample(tree):
    tree.write("samples/rust/rust_dm_linear.rs", (UPSTREAM / "rust_dm_linear.rs").read_text())
    tree.insert("samples/rust/Makefile", "obj-$(CONFIG_SAMPLE_RUST_DM_LINEAR)\t\t+= rust_dm_linear.o",
                r"obj-\$\(CONFIG_SAMPLE_RUST_D")
    tree.append("samples/rust/Kconfig", (UPSTREAM / "Kconfig-sample").read_text() + "\n", "config SAMPLE_RUST_PRINT")


def put_the_rest(tree):
    used = put_module(tree, "device_mapper", DEVICE_MAPPER)
    put_argument_tests(tree)
    bindings(tree, used, ["linux/dax.h"])
    helpers(tree, used, "rust/helpers/device_mapper.c", HEADERS)


def put_lower_read(tree):
    used = put_module(tree, "lower_read", DEVICE_MAPPER)
    bindings(tree, used, ["linux/dm-io.h", "linux/percpu_counter.h", "linux/vmalloc.h"])
    helpers(tree, used, "rust/helpers/lower_read.c", HEADERS)


def put_codecs(tree):
    used = put_module(tree, "codec", "CONFIG_RUST_CODECS")
    helpers(tree, used, "rust/helpers/codec.c", HEADERS)
    # And whatever else has become necessary.
    bindings(tree, used, re.findall(r"#include <(\S+)>", (RUST / "bindings/bindings_helper.h").read_text()))
    put_tests(tree, "codec_tests", "rust_codec", "rust/kernel/codec.rs")


def put_formats(tree):
    for path in sorted((RUST / "image").rglob("*.rs")):
        tree.write(f"{DRIVERS}/image/{path.relative_to(RUST / 'image')}", path.read_text())
    tree.add_maintainers("MAINTAINERS-2")


def put_target(name):
    def put(tree):
        for path in sorted((SOURCE / name).glob("*.rs")):
            tree.write(f"{DRIVERS}/{TARGETS[name]}/{path.name}", target_form(path.read_text(), tree.version))
        for file in ("Kconfig", "Makefile"):
            text = (UPSTREAM / file).read_text()
            wanted = ["header"] + list(TARGETS)[:list(TARGETS).index(name) + 1]
            parts = dict(re.findall(r"^# part: ([\w-]+)\n(.*?)(?=^# part: |\Z)", text, re.MULTILINE | re.DOTALL))
            tree.write(f"{DRIVERS}/{file}", "".join(parts[part] for part in wanted))
        tree.insert("drivers/md/Kconfig", 'source "drivers/md/dm-overlaybd/Kconfig"', 'source "drivers/md/dm-')
        tree.insert("drivers/md/Makefile", "obj-y\t\t\t\t+= dm-overlaybd/", r"obj-\$\(CONFIG_DM_VDO\)")
        tree.write(f"{MANUALS}/{name}.rst", (SOURCE / f"docs/{name}.rst").read_text())
        tree.insert(f"{MANUALS}/index.rst", f"    {name}", "    dm-")
    return put


# The postings and their patches: the file of the message in upstream/<posting>, and what it puts into the tree.
POSTINGS = {
    "1-device-mapper": [
        ("bindings", put_bindings),
        ("abstractions", put_abstractions),
        ("tests", put_argument_tests),
        ("sample", put_sample),
    ],
    "2-overlaybd": [
        ("rest", put_the_rest),
        ("lower-read", put_lower_read),
        ("codec", put_codecs),
        ("formats", put_formats),
        ("overlaybd", put_target("dm-overlaybd")),
        ("zfile", put_target("dm-zfile")),
    ],
}
