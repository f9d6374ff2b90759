# SPDX-License-Identifier: GPL-2.0
# The front door. Kernel builders use `make KDIR=<kernel build tree>`; every other verb prepares a toolchain root and
# a stock Debian kernel in a cache outside the checkout (selftests/harness) and works there.

HARNESS := selftests/harness
ENTER := $(if $(OVBD_INSIDE),python3 $(HARNESS),./$(HARNESS)/start)
CARGO := cd tools && cargo
# A folder of test cases; exported, because the guest's tests want it too.
ifdef CASES
export OVBD_ONLY_CASES := 1
endif
CASES ?= ../shared/fixtures
override CASES := $(abspath $(CASES))
export CASES
prefix ?= /usr/local

.DEFAULT_GOAL := modules
.PHONY: modules clean test test-all selftests torture planted upstream bench bench-compare bench-track profile demo demo-tar demo-system rustfmt \
	rustfmt-check clippy clippy-tools ovbd man install deb test-packages bench-boot bench-guests bench-seal bench-tar bench-host bench-registry bench-lvm bench-commit bench-lazy bench-system fuzz fuzz-smoke shell kernel-update distclean-cache help

ifdef KDIR
modules clean: ## build the modules, against KDIR=<kernel build tree> or the cached stock kernel
	$(MAKE) -C $(KDIR) M=$(CURDIR) $@
else
modules:
	@$(ENTER) modules
clean: ## remove what the builds left in the checkout
	@find . -path ./tools/target -prune -o \( -name '*.o' -o -name '*.ko' -o -name '*.mod' -o -name '*.mod.c' \
		-o -name '.*.cmd' -o -name '.*.d' -o -name modules.order -o -name Module.symvers \
		-o -name '*_generated.rs' \) -type f -exec rm {} +
	@rm -rf build
endif

test: ## run all checks and tests; installs what it needs into the cache
	@$(ENTER) test
test-all: ## that and what takes hours: more damaged images, planted bugs, the race detector, the series for the kernel
	@$(ENTER) test-all
selftests: ## run the guest tests; T='dm-overlaybd/*' selects, KERNEL=oldest, debug, fixed or kcsan, CASES=<folder> runs all cases in it instead
	@$(ENTER) selftests
torture: ## 50,000 damaged images through the targets in the debug kernel (see docs/testing.md)
	@T='hostile/*' KERNEL=debug OVBD_MUTANTS=1400 OVBD_TEST_LIMIT=14400 $(ENTER) selftests
planted: ## put bugs into the targets, one by one, and see the tests find them (debug kernel, KCSAN); P=lz4 is one of them
	@OVBD_TEST_LIMIT=300 OVBD_PLANTED=$(P) $(ENTER) planted
upstream: ## write the patches for the kernel, apply and compile them, and run their tests (build/upstream)
	@$(ENTER) upstream
bench: ## instructions for each read, beside all competitors; B='segments zfile/lz4-4k*' selects
	@$(ENTER) bench
bench-compare: ## the tracked figures of the modules of BASE=<commit> and of these
	@rm -rf build/bench/base && mkdir -p build/bench/base
	@git archive --output build/bench/base.tar $(BASE) && tar -x -C build/bench/base -f build/bench/base.tar
	@$(ENTER) bench-compare
bench-track: ## write the tracked figures anew; REASON='why' is recorded with them
	@$(ENTER) bench-track
profile: ## instructions function by function; W='lz4-4k-random' names the workload
	@$(ENTER) profile
bench-tar: ## a layer over a tar of MB=, beside mkfs, one read and lz4; metadata, memory of FILES=, random reads
ifdef OVBD_INSIDE
	$(CARGO) build --release --locked -p ovbd
	$(CARGO) build --release --locked -p ovbd-layers --example random_reads
	python3 selftests/bench/tar.py
else
	@$(ENTER) shell $(MAKE) $@
endif
bench-seal: ## seconds to seal an image of MB= and to seal it again, beside veritysetup
ifdef OVBD_INSIDE
	$(CARGO) build --release --locked -p ovbd
	python3 selftests/bench/seal.py
else
	@$(ENTER) shell $(MAKE) $@
endif
bench-lvm: ## push and pull of a thin volume of LVM_MB= in the native kernel, beside pipes of the same steps
	@KERNEL=native T=lvm/figures OVBD_UML_MEMORY=12G OVBD_LVM_MB=$(or $(LVM_MB),1024) OVBD_LVM_ROUNDS=3 $(ENTER) selftests
	@sed -n 's/^# //p' build/selftests-native/lvm/figures.log
bench-commit: ## how long writers wait for a commit, of 1 MiB and of COMMIT_MB=, and how fast it is: native kernel; stock kernel, 64 MiB
	@KERNEL=native T=ovbd/windows OVBD_UML_MEMORY=12G OVBD_TEST_LIMIT=3600 OVBD_WINDOW_MB=$(or $(COMMIT_MB),1024) OVBD_WINDOW_ROUNDS=5 $(ENTER) selftests
	@T=ovbd/windows OVBD_TEST_LIMIT=3600 OVBD_WINDOW_MB=64 OVBD_WINDOW_ROUNDS=5 $(ENTER) selftests
	@sed -n 's/^# //p' build/selftests-native/ovbd/windows.log build/selftests-stock/ovbd/windows.log
bench-lazy: ## how soon a program runs from an image in a slow registry, beside pulling it first; OVBD_LAZY_ROUNDS=
	@KERNEL=native T=ovbd/lazy_figures OVBD_UML_MEMORY=6G $(ENTER) bench-lazy
bench-system: ## what ten generations of a system fetch and keep, beside their layers, and what a switch writes: native kernel
	@KERNEL=native T=ovbd/deploy_figures $(ENTER) selftests
	@sed -n 's/^# //p' build/selftests-native/ovbd/deploy_figures.log
demo: ## push a Debian system from a thin volume in one VM, pull it in another, and boot from it
	@$(ENTER) demo
demo-tar: ## make a layer over the tar of a Debian container, mount and run it in a VM, and compare all files with tar
	@$(ENTER) demo-tar
demo-system: ## a machine that updates itself by layers, with firmware and systemd-boot: broken on purpose, falls back, is rolled back
	@$(ENTER) demo-system
clippy: ## lint the modules with the kernel's set and the tools with cargo's
	@$(ENTER) clippy
rustfmt: ## format all Rust source
rustfmt-check: ## compare all Rust source with its formatted form

KERNEL_RUST = $(shell find rust dm-* selftests -name '*.rs' ! -name '*_generated.rs')
ifdef OVBD_KERNEL_SOURCE
rustfmt:
	rustfmt --edition 2021 --config-path $(OVBD_KERNEL_SOURCE)/.rustfmt.toml $(KERNEL_RUST)
	$(CARGO) fmt --all
rustfmt-check:
	rustfmt --check --edition 2021 --config-path $(OVBD_KERNEL_SOURCE)/.rustfmt.toml $(KERNEL_RUST)
	$(CARGO) fmt --all --check
else
rustfmt:
	@$(ENTER) rustfmt
rustfmt-check:
	@$(ENTER) rustfmt --check
endif

ifdef OVBD_INSIDE
clippy-tools:
	$(CARGO) clippy --release --workspace --all-targets --locked -- -D warnings
ovbd: ## build the ovbd command (tools/target/release/ovbd)
	$(CARGO) build --release --locked
man:
	$(CARGO) build --release --locked --example man
install: ovbd man ## install ovbd, its manual pages and what boots from stacks; DESTDIR=, prefix=/usr/local
	scripts/install "$(DESTDIR)" $(prefix)
bench-host: ## benchmarks of the index, the merge and ovbd, on this machine
	$(CARGO) bench --locked -p ovbd-image
	$(CARGO) run --release --locked -p ovbd-layers --example throughput -- 256 1 5
	$(CARGO) build --release --locked -p ovbd
	python3 selftests/bench/squash.py
bench-registry: ## CPU time and memory to push and pull 1 GB, beside skopeo, oras and curl; MB= and LAYERS= change the image
	$(CARGO) build --release --locked -p ovbd
	python3 selftests/bench/registry.py
	$(CARGO) test --release --locked -p ovbd-oci --test servers a_cut_connection -- --nocapture | grep 'cuts each way'
fuzz-smoke: ## damage files at random, the same way each time, and read them
	$(CARGO) run --release --locked -p ovbd-cases --bin ovbd-fuzz -- $(CASES) 20000
	$(CARGO) run --release --locked -p ovbd-cases --bin ovbd-fuzz-lz4 -- 1000000
	$(CARGO) run --release --locked -p ovbd-cases --bin ovbd-fuzz-documents -- 1000000

# libFuzzer's instrumentation as stable compilers offer it.
FUZZ_FLAGS := -Cpasses=sancov-module --cfg fuzzing $(addprefix -Cllvm-args=-sanitizer-coverage-, \
	level=4 inline-8bit-counters pc-table trace-compares)
FUZZ_OPTIONS := -seed=1 -max_len=131072 -print_final_stats=1 -verbosity=0 -artifact_prefix=build/fuzz/
# With a target named, the flags do not reach build scripts.
FUZZ_TARGET := x86_64-unknown-linux-gnu
FUZZ := tools/target/fuzz/$(FUZZ_TARGET)/release
fuzz: ## libFuzzer on the formats and on lz4 (10 million runs each), and on the library
	cd tools/fuzz && CXX=clang++-19 RUSTFLAGS="$(FUZZ_FLAGS)" \
		cargo build --release --locked --target $(FUZZ_TARGET) --target-dir ../target/fuzz
	@mkdir -p build/fuzz/image build/fuzz/layer build/fuzz/log build/fuzz/lz4 build/fuzz/tar build/fuzz/gzindex
	$(FUZZ)/image -runs=10000000 $(FUZZ_OPTIONS) build/fuzz/image tools/fuzz/corpus/image
	$(FUZZ)/layer -runs=200000 $(FUZZ_OPTIONS) build/fuzz/layer tools/fuzz/corpus/layer
	$(FUZZ)/log -runs=200000 $(FUZZ_OPTIONS) build/fuzz/log tools/fuzz/corpus/log
	$(FUZZ)/tar -runs=1000000 $(FUZZ_OPTIONS) build/fuzz/tar
	$(FUZZ)/gzindex -runs=200000 $(FUZZ_OPTIONS) build/fuzz/gzindex tools/fuzz/corpus/gzindex
	$(FUZZ)/manifest -runs=1000000 $(FUZZ_OPTIONS) build/fuzz/manifest tools/fuzz/corpus/manifest
	$(FUZZ)/lz4 -runs=10000000 $(FUZZ_OPTIONS) build/fuzz/lz4
else
install:
	@$(ENTER) shell $(MAKE) install DESTDIR=$(CURDIR)/build/install prefix=$(prefix)
	mkdir -p $(DESTDIR)/
	cp -r --preserve=mode,links build/install/. $(DESTDIR)/
clippy-tools ovbd bench-host bench-registry fuzz fuzz-smoke:
	@$(ENTER) shell $(MAKE) $@
endif

deb: ## build Debian packages for the cached kernels (build/debs)
	@$(ENTER) deb
test-packages: ## build them twice, install them into a fresh Debian, and boot that
	@$(ENTER) test-packages
bench-guests: ## memory that an image takes in N='1 2 4' guests, as virtio-pmem and as virtio-blk
	@$(ENTER) bench-guests
bench-boot: ## instructions to boot from a stack, beside a dm-linear
	@$(ENTER) bench-boot
shell: ## a shell in the toolchain root
	@$(ENTER) shell
kernel-update: ## prepare the newest stock kernels that Debian has
	@$(ENTER) kernel-update
distclean-cache: ## remove the toolchain root, kernels and everything else in the cache
	@$(ENTER) remove-cache

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+.*:.*## / { sub(/ .*/, "", $$1); printf "  %-16s %s\n", $$1, $$2 }' Makefile
