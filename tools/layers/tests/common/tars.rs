// SPDX-License-Identifier: GPL-2.0

//! Tars made header by header, so that they can hold what no program writes.

#![allow(dead_code, missing_docs)]

/// A tar.
#[derive(Clone, Default)]
pub struct Tar(pub Vec<u8>);

/// A member's header.
#[derive(Clone)]
pub struct Member<'a> {
    pub name: &'a str,
    pub kind: u8,
    pub link: &'a str,
    pub mode: u32,
    pub bytes: u64,
    pub device: (u32, u32),
}

impl Default for Member<'_> {
    fn default() -> Self {
        Self {
            name: "file",
            kind: b'0',
            link: "",
            mode: 0o644,
            bytes: 0,
            device: (0, 0),
        }
    }
}

impl Member<'_> {
    pub fn header(&self) -> [u8; 512] {
        let mut block = [0; 512];
        let mut put = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
        put(0, self.name.as_bytes());
        put(100, format!("{:07o}", self.mode).as_bytes());
        put(108, b"0001750");
        put(116, b"0000144");
        match self.bytes >> 33 {
            0 => put(124, format!("{:011o}", self.bytes).as_bytes()),
            _ => {
                put(124, &[0x80, 0, 0, 0]);
                put(128, &self.bytes.to_be_bytes());
            }
        }
        put(136, b"14000000000");
        put(156, &[self.kind]);
        put(157, self.link.as_bytes());
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}", self.device.0).as_bytes());
        put(337, format!("{:07o}", self.device.1).as_bytes());
        set_checksum(&mut block);
        block
    }
}

pub fn set_checksum(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

impl Tar {
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// A member as it is told, and `content`, whatever size was told.
    pub fn member(self, member: &Member<'_>, content: &[u8]) -> Self {
        self.raw(&member.header()).raw(content)
    }

    pub fn file(self, name: &str, content: &[u8]) -> Self {
        let bytes = content.len() as u64;
        self.member(
            &Member {
                name,
                bytes,
                ..Member::default()
            },
            content,
        )
    }

    pub fn folder(self, name: &str) -> Self {
        self.kind(b'5', name, "")
    }

    pub fn symlink(self, name: &str, link: &str) -> Self {
        self.kind(b'2', name, link)
    }

    pub fn hardlink(self, name: &str, link: &str) -> Self {
        self.kind(b'1', name, link)
    }

    pub fn kind(self, kind: u8, name: &str, link: &str) -> Self {
        let mode = 0o755;
        let member = Member {
            name,
            kind,
            link,
            mode,
            ..Member::default()
        };
        self.member(&member, b"")
    }

    /// Records of an extended header for the next member.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + rest.to_string().len();
            if length.to_string().len() > rest.to_string().len() {
                length += 1;
            }
            body.extend_from_slice(format!("{length} {key}=").as_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.member(
            &Member {
                name: "pax",
                kind: b'x',
                bytes: body.len() as u64,
                ..Member::default()
            },
            &body,
        )
    }

    pub fn end(self) -> Vec<u8> {
        self.raw(&[0; 1024]).0
    }
}
