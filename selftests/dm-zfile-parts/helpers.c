// SPDX-License-Identifier: GPL-2.0
/* This module's copy of the C helpers for the bindings. */

#include "../../rust/bindings/helpers.c"
