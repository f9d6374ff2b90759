#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# dracut: says what the root device was waiting for.
[ ! -e /run/ovbd/error ] || [ -e /dev/mapper/root ] || warn "$(cat /run/ovbd/error)"
