# make build   the plugin: target/guestsnap-fd.so
# make install the plugin, the command and what belongs to it (PREFIX=/usr DESTDIR= PLUGINDIR=/usr/lib/bacula)
# make check   formatting, lints, documentation
# make test    all tiers; one alone: make test-unit, test-root, test-vm; FILTER=name for some tests of a tier
# make bench   against the daemon's own walk, minutes to an hour (BENCH="small large", BENCH_FILES=n, BENCH_ROUNDS=n)
# make fuzz    the fuzz targets for a few seconds each (FUZZ_SECONDS=600)
# make deb     a Debian package in target/debian (DEB_REVISION=2 for a later one of the same version)
# make rpm    an RPM package in target/generate-rpm
# make soak    the long versions of the tests that look for what is left, grows or leaks (some hours)
# make tsan    ThreadSanitizer over unit tests, filesystems and jobs, in a root of Debian 13 (as root)
# make demo    guests on LVM volumes, saved and restored by a real Bacula (DEMO=vm, DEMO_SUITE=trixie)
CARGO ?= cargo
FILTER ?=
TARGET := $(or $(CARGO_TARGET_DIR),target)

.PHONY: build install deps deps-build check test test-unit test-terminal test-root test-vm fuzz deb rpm soak tsan demo bench clean

build:
	$(CARGO) build --release --locked
	cp $(TARGET)/release/libguestsnap.so $(TARGET)/guestsnap-fd.so

deps:
	scripts/install-deps

deps-build:
	scripts/install-deps build

# An administrator's client file is kept. A daemon that runs must be restarted afterwards.
PREFIX ?= /usr
PLUGINDIR ?= /usr/lib/bacula
DOCDIR := $(DESTDIR)$(PREFIX)/share/doc/guestsnap-fd
install:
	install -D -m 644 $(TARGET)/guestsnap-fd.so $(DESTDIR)$(PLUGINDIR)/guestsnap-fd.so
	install -D -m 755 $(TARGET)/release/guestsnap $(DESTDIR)$(PREFIX)/sbin/guestsnap
	install -D -m 644 packaging/guestsnap.8 $(DESTDIR)$(PREFIX)/share/man/man8/guestsnap.8
	install -D -m 644 packaging/guestsnap.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/guestsnap
	install -D -m 644 packaging/_guestsnap $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_guestsnap
	install -D -m 644 packaging/guestsnap.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/guestsnap.fish
	install -d $(DOCDIR)/docs $(DOCDIR)/examples $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's|/usr/sbin/guestsnap|$(PREFIX)/sbin/guestsnap|' packaging/guestsnap-sweep.service \
		> $(DESTDIR)$(PREFIX)/lib/systemd/system/guestsnap-sweep.service
	install -m 644 README.md CHANGELOG.md LICENSE $(DOCDIR)/
	install -m 644 docs/*.md $(DOCDIR)/docs/
	install -m 644 bacula-conf/[cds]*/* $(DOCDIR)/examples/
	install -m 755 bacula-conf/monitoring/* $(DOCDIR)/examples/
	[ -e $(DESTDIR)/etc/bacula/guestsnap.toml ] || \
		install -D -m 644 packaging/deb/guestsnap.toml $(DESTDIR)/etc/bacula/guestsnap.toml

check:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --locked --no-deps

# One build for all tiers: the library and the command that are shipped, and every test. (The library alone is another
# build for cargo, because less is asked of what it depends on.)
programs: deps
	$(CARGO) build --release --locked --lib --bins --tests
	cp $(TARGET)/release/libguestsnap.so $(TARGET)/guestsnap-fd.so

# Each step with its time is in the summary at the end. Root tests and machines wait more than they compute: they begin as
# soon as they can, and what only computes runs beside them. With READY nothing is built that the steps before have built.
STEP = +@scripts/timed $(@:step-%=%) $(MAKE) --no-print-directory READY=1
test:
	$(if $(KEEP_TIMES),,rm -rf $(TARGET)/times)
	+@status=0; scripts/timed programs $(MAKE) --no-print-directory programs && \
		$(MAKE) --no-print-directory READY=1 -j1 step-test-unit step-test-terminal && \
		$(MAKE) --no-print-directory -k -j3 READY=1 step-test-vm step-test-root step-fuzz || status=$$?; \
		scripts/timed; exit $$status

.PHONY: programs images points step-images step-points step-deb step-test-unit step-test-terminal step-test-root step-test-vm step-fuzz
step-test-vm: step-images step-deb step-points
step-fuzz: step-deb step-images step-points
step-images step-points step-deb step-test-unit step-test-terminal step-test-root step-test-vm step-fuzz:
	$(STEP) $(@:step-%=%)

READY ?=
ifeq ($(READY),)
BUILT := deps programs
images points: $(BUILT)
deb: deps-build build
install: build
test-vm: deb
endif

# Root filesystems of the emulated machines, and the library with points to break at: else made by the first to need them.
images points:
	$(CARGO) test --release --locked --test vm -- --bed-$@

# Files in tests/: *_root (files or folders) and root.rs need root, vm.rs the emulated machines, demo.rs and bench.rs are no tests, all others need nothing.
UNIT := $(filter-out %_root root vm demo bench,$(basename $(notdir $(wildcard tests/*.rs))))
SO := GUESTSNAP_SO=$(abspath $(TARGET)/guestsnap-fd.so)

test-unit: $(BUILT)
	$(CARGO) test --release --locked --no-fail-fast --lib --bins $(addprefix --test ,$(UNIT)) $(FILTER)

# The unit tier as a developer sees it: on a terminal, in colours and without.
test-terminal: $(BUILT)
	TERM=xterm script -qec "$(CARGO) test --release --locked --no-fail-fast --lib --bins $(addprefix --test ,$(UNIT)) $(FILTER)" /dev/null
	TERM=xterm NO_COLOR=1 script -qec "$(CARGO) test --release --locked --bins $(FILTER)" /dev/null

# The tiers below test the very library that was built for them. What the kernel lacks for a test is named at the end.
ABSENT := $(TARGET)/tmp/absent
test-root: $(BUILT)
	rm -rf $(ABSENT)
	$(SO) $(CARGO) test --release --locked --no-fail-fast --test '*_root' --test root -- $(FILTER)
	@! ls $(ABSENT) >/dev/null 2>&1 || echo "not run here: $$(ls $(ABSENT) | paste -sd, | sed 's/,/, /g')"

DEB_FILE := GUESTSNAP_DEB=$$(ls $(abspath $(TARGET))/debian/guestsnap-fd_*.deb)
test-vm: $(BUILT)
	$(DEB_FILE) $(SO) $(CARGO) test --release --locked --test vm -- $(FILTER)

# Each target for FUZZ_SECONDS, two at a time, behind all else. What is found stays in fuzz/artifacts; see fuzz/README.md.
FUZZ_SECONDS ?= 5
FUZZ_TARGET := x86_64-unknown-linux-gnu
FUZZ_FLAGS := --cfg fuzzing -Cdebug-assertions -Coverflow-checks -Cpasses=sancov-module \
	$(addprefix -Cllvm-args=-sanitizer-coverage-,level=4 inline-8bit-counters pc-table trace-compares)

fuzz: $(if $(READY),,deps)
	cd fuzz && RUSTFLAGS="$(FUZZ_FLAGS)" $(CARGO) build --release --locked --target $(FUZZ_TARGET) --target-dir $(abspath $(TARGET))/fuzz
	for name in $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs))); do echo $$name; done | \
	xargs -P 2 -I NAME sh -ec 'mkdir -p $(TARGET)/fuzz/corpus/NAME fuzz/artifacts; \
		nice $(TARGET)/fuzz/$(FUZZ_TARGET)/release/NAME -max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=1024 \
		-artifact_prefix=fuzz/artifacts/NAME- $(TARGET)/fuzz/corpus/NAME fuzz/corpus/NAME > $(TARGET)/fuzz/NAME.log 2>&1 \
		|| { tail -40 $(TARGET)/fuzz/NAME.log; exit 255; }; echo NAME: $$(tail -n 1 $(TARGET)/fuzz/NAME.log)'

# The package of this machine's Debian or a later one: build on 12 for both. The tool is built without optimisation, which
# takes a third of the time, and compresses with the system's xz.
DEB_TOOL := $(TARGET)/tools/bin/cargo-deb
$(DEB_TOOL):
	CARGO_PROFILE_DEV_DEBUG=0 $(CARGO) install --locked --debug --no-default-features --root $(TARGET)/tools cargo-deb

deb: $(DEB_TOOL)
	rm -rf $(TARGET)/debian
	$(DEB_TOOL) --no-build --strip $(if $(DEB_REVISION),--deb-revision $(DEB_REVISION)) --output $(TARGET)/debian/

# For distributions with the C library of this machine or a later one.
RPM_TOOL := $(TARGET)/tools/bin/cargo-generate-rpm
$(RPM_TOOL):
	$(CARGO) install --locked --root $(TARGET)/tools cargo-generate-rpm

rpm: deps-build build $(RPM_TOOL)
	rm -rf $(TARGET)/generate-rpm $(TARGET)/rpm
	mkdir $(TARGET)/rpm
	strip -o $(TARGET)/rpm/guestsnap-fd.so $(TARGET)/guestsnap-fd.so
	strip -o $(TARGET)/rpm/guestsnap $(TARGET)/release/guestsnap
	$(RPM_TOOL) generate-rpm

# In the machines all scenarios run, each in both suites.
soak: deps build deb
	GUESTSNAP_SOAK=1 BED_OUTPUT=1 $(SO) $(CARGO) test --release --locked --test root -- --test-threads=1 root_soak
	GUESTSNAP_SOAK=1 $(SO) $(CARGO) test --release --locked --test root -- --test-threads=1 root_points
	GUESTSNAP_SOAK=1 $(SO) $(CARGO) test --release --locked --test root -- --test-threads=1 root_stalled
	GUESTSNAP_SOAK=1 BED_OUTPUT=1 $(DEB_FILE) $(SO) $(CARGO) test --release --locked --test vm
	GUESTSNAP_SANITIZER=address GUESTSNAP_SOAK=1 $(SO) $(CARGO) test --release --locked --test root -- --test-threads=1 root_points
	scripts/tsan

tsan: deps
	scripts/tsan

demo: deps build
	$(SO) $(CARGO) test --release --locked --test demo

# In memory, so that what is measured is the work and not the disk; `unchanged` reads from a disk, `vm` is emulated.
BENCH ?= small md5 large mixed unchanged memory slow slow-unchanged vm
bench: deps build
	TMPDIR=/dev/shm $(SO) $(CARGO) test --release --locked --test bench -- $(filter-out unchanged,$(BENCH))
	$(if $(filter unchanged,$(BENCH)),TMPDIR=/var/tmp $(SO) $(CARGO) test --release --locked --test bench -- unchanged)

clean:
	$(CARGO) clean
