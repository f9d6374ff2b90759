// SPDX-License-Identifier: GPL-2.0

//! Sealed stacks, beside veritysetup: the same bytes, and each takes what the other made.

#[path = "../../layers/tests/common/mod.rs"]
mod common;
mod run;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use common::{change, names, programs::has, raw_image};
use run::{bad, good, OVBD};
use tempfile::tempdir;

const BLOCK: usize = 4096;

/// What `veritysetup` prints where it succeeds; `None` where there is no such program.
fn veritysetup(at: &Path, words: &str) -> Option<Result<String, String>> {
    let mut command = Command::new("veritysetup");
    command.args(words.split(' ')).current_dir(at);
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(e) => {
            println!("skipped: veritysetup: {e}");
            return None;
        }
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stderr)),
    })
}

/// A field of what `veritysetup format` and `dump` print.
fn field(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_default().trim().to_owned()
}

/// The root and the bytes of the image, as `ovbd seal` prints them.
fn sealed(said: &str) -> (String, usize) {
    let (root, bytes) = said.trim().split_once(' ').unwrap();
    (root.to_owned(), bytes.parse().unwrap())
}

#[test]
fn the_tree_is_that_of_veritysetup() {
    for bytes in [
        512,
        BLOCK,
        5 * 512,
        128 * BLOCK,
        129 * BLOCK,
        (70 << 20) + 512,
    ] {
        let folder = tempdir().unwrap();
        let at = folder.path();
        raw_image(&at.join("raw"), bytes as u64, bytes as u64);
        good(at, "build -o base raw");
        let (root, data) = sealed(&good(at, "seal base -o seal"));
        assert_eq!(data, bytes.next_multiple_of(BLOCK));
        assert_eq!(
            fs::read_to_string(at.join("seal.roothash")).unwrap(),
            root,
            "veritysetup takes no end of line"
        );
        good(at, "verify base seal");
        good(at, "export base seal -o image");
        let image = fs::read(at.join("image")).unwrap();
        let raw = fs::read(at.join("raw")).unwrap();
        assert!(image[..bytes] == raw && image[bytes..data].iter().all(|byte| *byte == 0));

        // It takes ours.
        let Some(dump) = veritysetup(at, &format!("dump --hash-offset {data} image")) else {
            return;
        };
        let (salt, uuid) = (
            field(dump.as_ref().unwrap(), "Salt:"),
            field(dump.as_ref().unwrap(), "UUID:"),
        );
        let verify =
            format!("verify --root-hash-file seal.roothash --hash-offset {data} image image");
        veritysetup(at, &verify).unwrap().unwrap();

        // And makes the same.
        fs::write(at.join("copy"), &image[..data]).unwrap();
        let format = format!("format --salt {salt} --uuid {uuid} --hash-offset {data} copy copy");
        let said = veritysetup(at, &format).unwrap().unwrap();
        assert_eq!(field(&said, "Root hash:"), root);
        assert!(
            fs::read(at.join("copy")).unwrap() == image,
            "{bytes}: other bytes"
        );

        // Any bit that differs is seen.
        for place in [0, data - 1, data + BLOCK, image.len() - BLOCK] {
            let mut damaged = image.clone();
            if place < damaged.len() {
                damaged[place] ^= 1;
                fs::write(at.join("image"), damaged).unwrap();
                assert!(
                    veritysetup(at, &verify).unwrap().is_err(),
                    "{bytes}: byte {place}"
                );
            }
        }
    }
}

#[test]
fn a_stack_that_is_sealed_again_stores_what_changed_of_the_tree() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    let bytes = 70_usize << 20;
    raw_image(&at.join("raw"), bytes as u64, 1);
    good(at, "build -o base raw");
    good(at, "seal base -o seal");
    change(&at.join("raw"), 2);
    let new = fs::read(at.join("raw")).unwrap();
    good(at, "build --base base seal -o next raw");
    let (root, data) = sealed(&good(at, "seal base seal next -o again"));
    good(at, "export base seal next again -o image");
    let image = fs::read(at.join("image")).unwrap();
    assert!(image[..bytes] == new);
    if let Some(verified) = veritysetup(
        at,
        &format!("verify --root-hash-file again.roothash --hash-offset {data} image image"),
    ) {
        verified.unwrap();
    }
    let stored = |layer: &str| -> u64 {
        let info: serde_json::Value =
            serde_json::from_str(&good(at, &format!("info --json {layer}"))).unwrap();
        info["layers"][0]["data_bytes"].as_u64().unwrap()
    };
    // Of 12 changes each is in at most 38 blocks, whose digests are in at most two blocks; and four blocks above.
    let (again, all) = (stored("again"), stored("seal"));
    println!("{again} bytes of a tree of {all}");
    assert!(again <= 28 * BLOCK as u64 && again < all, "{again} {all}");

    // What was written to the sealed device, with its tree, has its size.
    good(at, "export base seal -o written");
    let mut written = fs::read(at.join("written")).unwrap();
    written[..bytes].copy_from_slice(&new);
    fs::write(at.join("written"), written).unwrap();
    good(at, "build --base base seal -o third written");
    let said = good(at, "seal base seal third -o fourth");
    assert_eq!(sealed(&said), (root, data));
    assert_eq!(stored("fourth"), stored("again"));

    assert_eq!(
        bad(at, "seal base seal next again -o fifth", 1),
        "ovbd: fifth: the stack has this seal already\n"
    );
    assert!(!names(at).contains(&"fifth".to_owned()));
}

#[test]
fn what_changed_alone_gives_the_same_seal() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    raw_image(&at.join("raw"), 20 << 20, 1);
    let said = good(at, "build --verity seal -o base raw");
    assert_eq!(
        good(
            at,
            "seal base -o again --uuid 00000000-0000-0000-0000-000000000001"
        ),
        said
    );
    change(&at.join("raw"), 2);
    good(at, "build --base base seal -o next raw");
    let all = good(at, "seal base seal next -o all");
    let root = fs::read_to_string(at.join("seal.roothash")).unwrap();
    for old in ["seal.roothash", &root] {
        let said = good(
            at,
            &format!("seal --old-root {old} base seal next --force -o changed"),
        );
        assert_eq!(said, all);
        assert!(fs::read(at.join("all")).unwrap() == fs::read(at.join("changed")).unwrap());
    }
    let said = bad(
        at,
        "seal --old-root all.roothash base seal next -o wrong",
        1,
    );
    assert!(said.contains("with that root hash"), "{said}");
    bad(at, "seal --old-root nothing base seal next -o wrong", 1);
    assert!(!names(at).iter().any(|name| name.starts_with("wrong")));
    bad(at, "build --verity seal2 -o - raw", 2);
}

/// Runs `openssl`, which must succeed.
fn openssl(at: &Path, words: &str) {
    let mut command = Command::new("openssl");
    let command = command.args(words.split(' ')).current_dir(at);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}: {said}");
}

#[test]
fn a_signature_is_that_of_the_root_hash() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    raw_image(&at.join("raw"), 1 << 20, 1);
    good(at, "build -o base raw");
    for name in ["a", "b"] {
        openssl(
            at,
            &format!("req -x509 -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.pem"),
        );
    }
    good(at, "seal --sign-key a.key --certificate a.pem base -o seal");
    openssl(
        at,
        "smime -verify -binary -inform der -in seal.roothash.p7s -content seal.roothash -certfile a.pem -nointern -noverify",
    );
    let said = bad(
        at,
        "seal --sign-key a.key --certificate b.pem base -o other",
        1,
    );
    assert!(
        said.contains("openssl") || said.contains("is not the certificate"),
        "{said}"
    );
    bad(
        at,
        "seal --sign-key raw --certificate a.pem base -o third",
        1,
    );
    bad(at, "seal --sign-key a.key base -o fourth", 2);
    bad(
        at,
        "push --sign-key a.key --certificate a.pem base oci:store:x",
        2,
    );
    assert!(!names(at)
        .iter()
        .any(|name| name.ends_with("p7s") && name != "seal.roothash.p7s"));

    // Signed when it is an image already. Reads all of it, and signs nothing else.
    good(at, "--quiet push --seal base oci:store:x");
    good(
        at,
        "--quiet sign --sign-key a.key --certificate a.pem oci:store:x",
    );
    let index: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(at.join("store/index.json")).unwrap()).unwrap();
    let digest = index["manifests"][0]["digest"].as_str().unwrap();
    let manifest = at.join("store/blobs").join(digest.replace(':', "/"));
    let manifest: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(manifest).unwrap()).unwrap();
    let annotation =
        |name: &str| manifest["annotations"][format!("vnd.dm-overlaybd.verity.{name}")].clone();
    let root = fs::read_to_string(at.join("seal.roothash")).unwrap();
    assert_eq!(annotation("root"), root);
    assert_eq!(annotation("offset"), (1 << 20).to_string());
    assert!(annotation("signature").is_string());
    good(at, "--quiet push base oci:store:plain");
    let said = bad(
        at,
        "sign --sign-key a.key --certificate a.pem oci:store:plain",
        1,
    );
    assert!(said.contains("no seal is on top of the stack"), "{said}");
    // The topmost layer says what it is with --verity too.
    good(
        at,
        "--quiet push --verity seal.roothash base seal oci:store:given",
    );
    let said = bad(
        at,
        &format!(
            "push --verity {} base seal oci:store:wrong",
            "ab".repeat(32)
        ),
        1,
    );
    assert!(
        said.contains("the root of the hash tree is another"),
        "{said}"
    );
}

#[test]
fn nothing_is_replaced_unasked() {
    let folder = tempdir().unwrap();
    let at = folder.path();
    raw_image(&at.join("raw"), 1 << 20, 1);
    good(at, "build -o base raw");
    fs::write(at.join("seal.roothash"), "precious").unwrap();
    assert_eq!(
        bad(at, "seal base -o seal", 1),
        "ovbd: seal.roothash: already exists (--force replaces it)\n"
    );
    assert_eq!(names(at), ["base", "raw", "seal.roothash"]);
    good(at, "seal base --force -o seal");
    // Neither the seal nor the root hash replaces a layer.
    bad(at, "seal base --force -o base", 1);
    fs::copy(at.join("base"), at.join("x.roothash")).unwrap();
    bad(at, "seal x.roothash --force -o x", 1);
    good(at, "verify base");
    good(at, "verify x.roothash");
    assert!(!names(at).contains(&"x".to_owned()));
    bad(at, "seal base -o -", 2);
}

#[test]
fn a_key_that_does_not_leave_its_token_signs() {
    // By name, as the dynamic linker finds it.
    let softokn = Path::new("libsoftokn3.so");
    if !has("certutil") {
        return;
    }
    let folder = tempdir().unwrap();
    let at = folder.path();
    raw_image(&at.join("raw"), 1 << 20, 1);
    good(at, "build -o base raw");
    // The database of a browser is a token that a program can make.
    fs::create_dir(at.join("token")).unwrap();
    fs::write(at.join("noise"), [7; 64]).unwrap();
    let database = format!("-d sql:{}", at.join("token").display());
    let run = |program: &str, words: &str| {
        let mut command = Command::new(program);
        let command = command.args(words.split(' ')).current_dir(at);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {words}: {said}");
        output.stdout
    };
    run("certutil", &format!("-N {database} --empty-password"));
    run(
        "certutil",
        &format!("-S {database} -n vm -s CN=vm -x -t u,u,u -g 2048 -z noise -k rsa"),
    );
    fs::write(
        at.join("vm.pem"),
        run("certutil", &format!("-L {database} -n vm -a")),
    )
    .unwrap();
    // What comes after "activate" is not looked at.
    let configuration = format!(
        "openssl_conf = init\n[init]\nproviders = providers\n[providers]\ndefault = standard\npkcs11 = token\n\
         [standard]\nactivate = 1\n[token]\npkcs11-module-path = {}\n\
         pkcs11-module-init-args = configDir=sql:{}\nactivate = 1\n",
        softokn.display(),
        at.join("token").display()
    );
    fs::write(at.join("openssl.cnf"), configuration).unwrap();
    let sign = |key: &str| {
        Command::new(OVBD)
            .args(["seal", "--sign-key", key, "--certificate", "vm.pem", "base"])
            .args(["--force", "-o", "seal"])
            .env("OPENSSL_CONF", at.join("openssl.cnf"))
            .current_dir(at)
            .output()
            .unwrap()
    };
    let signed = sign("pkcs11:type=private");
    assert!(
        signed.status.success(),
        "{}",
        String::from_utf8_lossy(&signed.stderr)
    );
    openssl(
        at,
        "smime -verify -binary -inform der -in seal.roothash.p7s -content seal.roothash -certfile vm.pem -nointern -noverify",
    );
    let other = sign("pkcs11:object=another;type=private");
    assert!(
        !other.status.success(),
        "signed with a key that there is not"
    );
}
