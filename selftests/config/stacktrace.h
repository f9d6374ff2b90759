/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Included where the debug kernel's arch/um/kernel/stacktrace.c is compiled.
 *
 * That file asks for each word of a stack whether it is the address of code,
 * with a lock that lockdep follows, although it keeps return addresses of
 * frames only. KASAN and kmemleak want a trace for every allocation, and nine
 * tenths of what the kernel did was this. Here only the words at the place of
 * a return address are asked about; `sp` and `bp` are variables of
 * dump_trace().
 */
#include <linux/kernel.h>

#define __kernel_text_address(addr) \
	((unsigned long)sp == bp + sizeof(long) && __kernel_text_address(addr))
