// SPDX-License-Identifier: GPL-2.0

//! A TCP proxy that counts, cuts, stalls and slows connections.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
        Arc,
    },
    time::Duration,
};

/// What happens to a direction: each takes effect at a byte of all bytes together.
#[derive(Default)]
pub struct Direction {
    /// Bytes that went through.
    pub bytes: AtomicU64,
    /// The connection ends after this many, once. 0 is never.
    pub cut: AtomicU64,
    /// Nothing goes through after this many, once. 0 is never.
    pub stall: AtomicU64,
    /// Bytes a second; 0 is any number.
    pub rate: AtomicU64,
}

#[derive(Default)]
pub struct Faults {
    pub up: Direction,
    pub down: Direction,
    ended: AtomicBool,
}

pub struct Proxy {
    pub host: String,
    pub faults: Arc<Faults>,
}

impl Proxy {
    /// A proxy before `server`.
    pub fn start(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let faults: Arc<Faults> = Arc::default();
        let (inside, server) = (Arc::clone(&faults), server.to_owned());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if inside.ended.load(SeqCst) {
                    return;
                }
                let Ok(server) = TcpStream::connect(&server) else {
                    continue;
                };
                for up in [true, false] {
                    let (from, to) = if up {
                        (&client, &server)
                    } else {
                        (&server, &client)
                    };
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let faults = Arc::clone(&inside);
                    std::thread::spawn(move || {
                        pass(from, to, if up { &faults.up } else { &faults.down })
                    });
                }
            }
        });
        Self { host, faults }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.faults.ended.store(true, SeqCst);
        TcpStream::connect(&self.host).ok();
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, direction: &Direction) {
    let mut buffer = [0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let before = direction.bytes.fetch_add(count as u64, SeqCst);
        let reached = |limit: &AtomicU64| {
            let at = limit.load(SeqCst);
            let now = at != 0 && before + count as u64 >= at;
            (now && limit.compare_exchange(at, 0, SeqCst, SeqCst).is_ok()).then_some(at)
        };
        if let Some(at) = reached(&direction.cut) {
            to.write_all(&buffer[..(at.saturating_sub(before) as usize).min(count)])
                .ok();
            // Both halves of both: whoever waits on one of them sees it.
            from.shutdown(Shutdown::Both).ok();
            to.shutdown(Shutdown::Both).ok();
            return;
        }
        if reached(&direction.stall).is_some() {
            // As if the cable was out; ends with the connection.
            while from.peek(&mut [0]).is_ok_and(|count| count > 0) {
                std::thread::sleep(Duration::from_millis(20));
                if from.take_error().is_err() || to.write(&[]).is_err() {
                    return;
                }
            }
            return;
        }
        let rate = direction.rate.load(SeqCst);
        if rate > 0 {
            std::thread::sleep(Duration::from_secs_f64(count as f64 / rate as f64));
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    to.shutdown(Shutdown::Write).ok();
}
