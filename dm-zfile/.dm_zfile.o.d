dm-zfile/dm_zfile.o: /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/source/.clippy.toml dm-zfile/dm_zfile.rs dm-zfile/../rust/bindings/mod.rs dm-zfile/cache.rs dm-zfile/../rust/codec/mod.rs dm-zfile/../rust/codec/crc32c.rs dm-zfile/../rust/codec/digest.rs dm-zfile/../rust/codec/lz4.rs dm-zfile/../rust/codec/lz4/memory.rs dm-zfile/../rust/codec/lz4/x86_64.rs dm-zfile/../rust/codec/lz4_block.rs dm-zfile/../rust/codec/zstd.rs dm-zfile/counters.rs dm-zfile/../rust/device_mapper/mod.rs dm-zfile/../rust/device_mapper/args.rs dm-zfile/../rust/device_mapper/bio.rs dm-zfile/../rust/device_mapper/callbacks.rs dm-zfile/../rust/device_mapper/constructor.rs dm-zfile/../rust/device_mapper/device.rs dm-zfile/../rust/device_mapper/error.rs dm-zfile/../rust/device_mapper/instance.rs dm-zfile/../rust/device_mapper/limits.rs dm-zfile/../rust/device_mapper/log.rs dm-zfile/../rust/device_mapper/per_bio.rs dm-zfile/../rust/device_mapper/registration.rs dm-zfile/../rust/device_mapper/status.rs dm-zfile/../rust/device_mapper/target.rs dm-zfile/file.rs dm-zfile/../rust/image/mod.rs dm-zfile/../rust/image/error.rs dm-zfile/../rust/image/index.rs dm-zfile/../rust/image/jump_table.rs dm-zfile/../rust/image/layer_index.rs dm-zfile/../rust/image/lsmt.rs dm-zfile/../rust/image/merge.rs dm-zfile/../rust/image/segment.rs dm-zfile/../rust/image/zfile.rs dm-zfile/../rust/lower_read/mod.rs dm-zfile/../rust/lower_read/bio_read.rs dm-zfile/../rust/lower_read/buffers.rs dm-zfile/../rust/lower_read/counters.rs dm-zfile/../rust/lower_read/flags.rs dm-zfile/../rust/lower_read/metadata.rs dm-zfile/../rust/lower_read/pages.rs dm-zfile/../rust/lower_read/shared.rs dm-zfile/options.rs dm-zfile/pool.rs dm-zfile/read.rs dm-zfile/../rust/bindings/bindings_generated.rs /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libcore.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libcompiler_builtins.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libkernel.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libffi.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libpin_init.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libpin_init_internal.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libmacros.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libbuild_error.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libzerocopy.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libbindings.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libzerocopy_derive.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libuapi.rmeta

dm-zfile/.dm_zfile.o.d: /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/source/.clippy.toml dm-zfile/dm_zfile.rs dm-zfile/../rust/bindings/mod.rs dm-zfile/cache.rs dm-zfile/../rust/codec/mod.rs dm-zfile/../rust/codec/crc32c.rs dm-zfile/../rust/codec/digest.rs dm-zfile/../rust/codec/lz4.rs dm-zfile/../rust/codec/lz4/memory.rs dm-zfile/../rust/codec/lz4/x86_64.rs dm-zfile/../rust/codec/lz4_block.rs dm-zfile/../rust/codec/zstd.rs dm-zfile/counters.rs dm-zfile/../rust/device_mapper/mod.rs dm-zfile/../rust/device_mapper/args.rs dm-zfile/../rust/device_mapper/bio.rs dm-zfile/../rust/device_mapper/callbacks.rs dm-zfile/../rust/device_mapper/constructor.rs dm-zfile/../rust/device_mapper/device.rs dm-zfile/../rust/device_mapper/error.rs dm-zfile/../rust/device_mapper/instance.rs dm-zfile/../rust/device_mapper/limits.rs dm-zfile/../rust/device_mapper/log.rs dm-zfile/../rust/device_mapper/per_bio.rs dm-zfile/../rust/device_mapper/registration.rs dm-zfile/../rust/device_mapper/status.rs dm-zfile/../rust/device_mapper/target.rs dm-zfile/file.rs dm-zfile/../rust/image/mod.rs dm-zfile/../rust/image/error.rs dm-zfile/../rust/image/index.rs dm-zfile/../rust/image/jump_table.rs dm-zfile/../rust/image/layer_index.rs dm-zfile/../rust/image/lsmt.rs dm-zfile/../rust/image/merge.rs dm-zfile/../rust/image/segment.rs dm-zfile/../rust/image/zfile.rs dm-zfile/../rust/lower_read/mod.rs dm-zfile/../rust/lower_read/bio_read.rs dm-zfile/../rust/lower_read/buffers.rs dm-zfile/../rust/lower_read/counters.rs dm-zfile/../rust/lower_read/flags.rs dm-zfile/../rust/lower_read/metadata.rs dm-zfile/../rust/lower_read/pages.rs dm-zfile/../rust/lower_read/shared.rs dm-zfile/options.rs dm-zfile/pool.rs dm-zfile/read.rs dm-zfile/../rust/bindings/bindings_generated.rs /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libcore.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libcompiler_builtins.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libkernel.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libffi.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libpin_init.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libpin_init_internal.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libmacros.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libbuild_error.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libzerocopy.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libbindings.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libzerocopy_derive.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libuapi.rmeta

/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/source/.clippy.toml:
dm-zfile/dm_zfile.rs:
dm-zfile/../rust/bindings/mod.rs:
dm-zfile/cache.rs:
dm-zfile/../rust/codec/mod.rs:
dm-zfile/../rust/codec/crc32c.rs:
dm-zfile/../rust/codec/digest.rs:
dm-zfile/../rust/codec/lz4.rs:
dm-zfile/../rust/codec/lz4/memory.rs:
dm-zfile/../rust/codec/lz4/x86_64.rs:
dm-zfile/../rust/codec/lz4_block.rs:
dm-zfile/../rust/codec/zstd.rs:
dm-zfile/counters.rs:
dm-zfile/../rust/device_mapper/mod.rs:
dm-zfile/../rust/device_mapper/args.rs:
dm-zfile/../rust/device_mapper/bio.rs:
dm-zfile/../rust/device_mapper/callbacks.rs:
dm-zfile/../rust/device_mapper/constructor.rs:
dm-zfile/../rust/device_mapper/device.rs:
dm-zfile/../rust/device_mapper/error.rs:
dm-zfile/../rust/device_mapper/instance.rs:
dm-zfile/../rust/device_mapper/limits.rs:
dm-zfile/../rust/device_mapper/log.rs:
dm-zfile/../rust/device_mapper/per_bio.rs:
dm-zfile/../rust/device_mapper/registration.rs:
dm-zfile/../rust/device_mapper/status.rs:
dm-zfile/../rust/device_mapper/target.rs:
dm-zfile/file.rs:
dm-zfile/../rust/image/mod.rs:
dm-zfile/../rust/image/error.rs:
dm-zfile/../rust/image/index.rs:
dm-zfile/../rust/image/jump_table.rs:
dm-zfile/../rust/image/layer_index.rs:
dm-zfile/../rust/image/lsmt.rs:
dm-zfile/../rust/image/merge.rs:
dm-zfile/../rust/image/segment.rs:
dm-zfile/../rust/image/zfile.rs:
dm-zfile/../rust/lower_read/mod.rs:
dm-zfile/../rust/lower_read/bio_read.rs:
dm-zfile/../rust/lower_read/buffers.rs:
dm-zfile/../rust/lower_read/counters.rs:
dm-zfile/../rust/lower_read/flags.rs:
dm-zfile/../rust/lower_read/metadata.rs:
dm-zfile/../rust/lower_read/pages.rs:
dm-zfile/../rust/lower_read/shared.rs:
dm-zfile/options.rs:
dm-zfile/pool.rs:
dm-zfile/read.rs:
dm-zfile/../rust/bindings/bindings_generated.rs:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libcore.rmeta:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libcompiler_builtins.rmeta:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libkernel.rmeta:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libffi.rmeta:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libpin_init.rmeta:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libpin_init_internal.so:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libmacros.so:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libbuild_error.rmeta:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libzerocopy.rmeta:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libbindings.rmeta:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libzerocopy_derive.so:
/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libuapi.rmeta:

# env-dep:CLIPPY_ARGS
# env-dep:CLIPPY_CONF_DIR=/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/source
