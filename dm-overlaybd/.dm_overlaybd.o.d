dm-overlaybd/dm_overlaybd.o: /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/source/.clippy.toml dm-overlaybd/dm_overlaybd.rs dm-overlaybd/../rust/bindings/mod.rs dm-overlaybd/../rust/codec/mod.rs dm-overlaybd/../rust/codec/crc32c.rs dm-overlaybd/../rust/codec/digest.rs dm-overlaybd/../rust/codec/lz4.rs dm-overlaybd/../rust/codec/lz4/memory.rs dm-overlaybd/../rust/codec/lz4/x86_64.rs dm-overlaybd/../rust/codec/lz4_block.rs dm-overlaybd/../rust/codec/zstd.rs dm-overlaybd/../rust/device_mapper/mod.rs dm-overlaybd/../rust/device_mapper/args.rs dm-overlaybd/../rust/device_mapper/bio.rs dm-overlaybd/../rust/device_mapper/callbacks.rs dm-overlaybd/../rust/device_mapper/constructor.rs dm-overlaybd/../rust/device_mapper/device.rs dm-overlaybd/../rust/device_mapper/error.rs dm-overlaybd/../rust/device_mapper/instance.rs dm-overlaybd/../rust/device_mapper/limits.rs dm-overlaybd/../rust/device_mapper/log.rs dm-overlaybd/../rust/device_mapper/per_bio.rs dm-overlaybd/../rust/device_mapper/registration.rs dm-overlaybd/../rust/device_mapper/status.rs dm-overlaybd/../rust/device_mapper/target.rs dm-overlaybd/../rust/image/mod.rs dm-overlaybd/../rust/image/error.rs dm-overlaybd/../rust/image/index.rs dm-overlaybd/../rust/image/jump_table.rs dm-overlaybd/../rust/image/layer_index.rs dm-overlaybd/../rust/image/lsmt.rs dm-overlaybd/../rust/image/merge.rs dm-overlaybd/../rust/image/segment.rs dm-overlaybd/../rust/image/zfile.rs dm-overlaybd/../rust/lower_read/mod.rs dm-overlaybd/../rust/lower_read/bio_read.rs dm-overlaybd/../rust/lower_read/buffers.rs dm-overlaybd/../rust/lower_read/counters.rs dm-overlaybd/../rust/lower_read/flags.rs dm-overlaybd/../rust/lower_read/metadata.rs dm-overlaybd/../rust/lower_read/pages.rs dm-overlaybd/../rust/lower_read/shared.rs dm-overlaybd/merged.rs dm-overlaybd/stack.rs dm-overlaybd/../rust/bindings/bindings_generated.rs /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libcore.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libcompiler_builtins.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libkernel.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libffi.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libpin_init.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libpin_init_internal.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libmacros.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libbuild_error.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libzerocopy.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libbindings.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libzerocopy_derive.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libuapi.rmeta

dm-overlaybd/.dm_overlaybd.o.d: /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/source/.clippy.toml dm-overlaybd/dm_overlaybd.rs dm-overlaybd/../rust/bindings/mod.rs dm-overlaybd/../rust/codec/mod.rs dm-overlaybd/../rust/codec/crc32c.rs dm-overlaybd/../rust/codec/digest.rs dm-overlaybd/../rust/codec/lz4.rs dm-overlaybd/../rust/codec/lz4/memory.rs dm-overlaybd/../rust/codec/lz4/x86_64.rs dm-overlaybd/../rust/codec/lz4_block.rs dm-overlaybd/../rust/codec/zstd.rs dm-overlaybd/../rust/device_mapper/mod.rs dm-overlaybd/../rust/device_mapper/args.rs dm-overlaybd/../rust/device_mapper/bio.rs dm-overlaybd/../rust/device_mapper/callbacks.rs dm-overlaybd/../rust/device_mapper/constructor.rs dm-overlaybd/../rust/device_mapper/device.rs dm-overlaybd/../rust/device_mapper/error.rs dm-overlaybd/../rust/device_mapper/instance.rs dm-overlaybd/../rust/device_mapper/limits.rs dm-overlaybd/../rust/device_mapper/log.rs dm-overlaybd/../rust/device_mapper/per_bio.rs dm-overlaybd/../rust/device_mapper/registration.rs dm-overlaybd/../rust/device_mapper/status.rs dm-overlaybd/../rust/device_mapper/target.rs dm-overlaybd/../rust/image/mod.rs dm-overlaybd/../rust/image/error.rs dm-overlaybd/../rust/image/index.rs dm-overlaybd/../rust/image/jump_table.rs dm-overlaybd/../rust/image/layer_index.rs dm-overlaybd/../rust/image/lsmt.rs dm-overlaybd/../rust/image/merge.rs dm-overlaybd/../rust/image/segment.rs dm-overlaybd/../rust/image/zfile.rs dm-overlaybd/../rust/lower_read/mod.rs dm-overlaybd/../rust/lower_read/bio_read.rs dm-overlaybd/../rust/lower_read/buffers.rs dm-overlaybd/../rust/lower_read/counters.rs dm-overlaybd/../rust/lower_read/flags.rs dm-overlaybd/../rust/lower_read/metadata.rs dm-overlaybd/../rust/lower_read/pages.rs dm-overlaybd/../rust/lower_read/shared.rs dm-overlaybd/merged.rs dm-overlaybd/stack.rs dm-overlaybd/../rust/bindings/bindings_generated.rs /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libcore.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libcompiler_builtins.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libkernel.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libffi.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libpin_init.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libpin_init_internal.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libmacros.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libbuild_error.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libzerocopy.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libbindings.rmeta /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libzerocopy_derive.so /var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/build/rust/libuapi.rmeta

/var/cache/dm-overlaybd/kernel/7.3.4+deb13-cloud-amd64/source/.clippy.toml:
dm-overlaybd/dm_overlaybd.rs:
dm-overlaybd/../rust/bindings/mod.rs:
dm-overlaybd/../rust/codec/mod.rs:
dm-overlaybd/../rust/codec/crc32c.rs:
dm-overlaybd/../rust/codec/digest.rs:
dm-overlaybd/../rust/codec/lz4.rs:
dm-overlaybd/../rust/codec/lz4/memory.rs:
dm-overlaybd/../rust/codec/lz4/x86_64.rs:
dm-overlaybd/../rust/codec/lz4_block.rs:
dm-overlaybd/../rust/codec/zstd.rs:
dm-overlaybd/../rust/device_mapper/mod.rs:
dm-overlaybd/../rust/device_mapper/args.rs:
dm-overlaybd/../rust/device_mapper/bio.rs:
dm-overlaybd/../rust/device_mapper/callbacks.rs:
dm-overlaybd/../rust/device_mapper/constructor.rs:
dm-overlaybd/../rust/device_mapper/device.rs:
dm-overlaybd/../rust/device_mapper/error.rs:
dm-overlaybd/../rust/device_mapper/instance.rs:
dm-overlaybd/../rust/device_mapper/limits.rs:
dm-overlaybd/../rust/device_mapper/log.rs:
dm-overlaybd/../rust/device_mapper/per_bio.rs:
dm-overlaybd/../rust/device_mapper/registration.rs:
dm-overlaybd/../rust/device_mapper/status.rs:
dm-overlaybd/../rust/device_mapper/target.rs:
dm-overlaybd/../rust/image/mod.rs:
dm-overlaybd/../rust/image/error.rs:
dm-overlaybd/../rust/image/index.rs:
dm-overlaybd/../rust/image/jump_table.rs:
dm-overlaybd/../rust/image/layer_index.rs:
dm-overlaybd/../rust/image/lsmt.rs:
dm-overlaybd/../rust/image/merge.rs:
dm-overlaybd/../rust/image/segment.rs:
dm-overlaybd/../rust/image/zfile.rs:
dm-overlaybd/../rust/lower_read/mod.rs:
dm-overlaybd/../rust/lower_read/bio_read.rs:
dm-overlaybd/../rust/lower_read/buffers.rs:
dm-overlaybd/../rust/lower_read/counters.rs:
dm-overlaybd/../rust/lower_read/flags.rs:
dm-overlaybd/../rust/lower_read/metadata.rs:
dm-overlaybd/../rust/lower_read/pages.rs:
dm-overlaybd/../rust/lower_read/shared.rs:
dm-overlaybd/merged.rs:
dm-overlaybd/stack.rs:
dm-overlaybd/../rust/bindings/bindings_generated.rs:
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
