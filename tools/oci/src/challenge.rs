// SPDX-License-Identifier: GPL-2.0

//! What a registry demands before it answers: the header `WWW-Authenticate`.

use std::collections::BTreeMap;

/// One challenge: a scheme and its parameters, names in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    /// In lower case: `basic`, `bearer`.
    pub scheme: String,
    /// `realm`, `service`, `scope`, ...
    pub parameters: BTreeMap<String, String>,
}

/// All challenges of one header, in its order. What cannot be understood ends the list.
pub fn parse(header: &str) -> Vec<Challenge> {
    let mut rest = header;
    let mut challenges: Vec<Challenge> = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let Some((word, after)) = token(rest) else {
            return challenges;
        };
        let next = after.trim_start_matches([' ', '\t']);
        match (next.strip_prefix('='), challenges.last_mut()) {
            (Some(value), Some(challenge)) => {
                let Some((value, after)) = value_of(value.trim_start_matches([' ', '\t'])) else {
                    return challenges;
                };
                challenge
                    .parameters
                    .insert(word.to_ascii_lowercase(), value);
                rest = after;
            }
            (Some(_), None) => return challenges,
            (None, _) => {
                challenges.push(Challenge {
                    scheme: word.to_ascii_lowercase(),
                    parameters: BTreeMap::new(),
                });
                rest = next;
            }
        }
    }
}

fn token(text: &str) -> Option<(&str, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_alphanumeric() && !"!#$%&'*+-.^_`|~".contains(c))
        .unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

fn value_of(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(header: &str) -> String {
        let one = |challenge: &Challenge| {
            let parameters: Vec<String> = challenge
                .parameters
                .iter()
                .map(|(k, v)| format!("{k}={v}"))
                .collect();
            format!("{}[{}]", challenge.scheme, parameters.join(";"))
        };
        parse(header).iter().map(one).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn headers_of_registries() {
        for (header, right) in [
            (r#"Basic realm="Registry""#, "basic[realm=Registry]"),
            (
                r#"Bearer realm="https://auth.example/token",service="reg.example",scope="repository:a/b:pull,push",error="invalid_token""#,
                "bearer[error=invalid_token;realm=https://auth.example/token;scope=repository:a/b:pull,push;service=reg.example]",
            ),
            (r#"BEARER Realm = "x" , Service=y, basic realm="a \"b\", c""#, r#"bearer[realm=x;service=y] basic[realm=a "b", c]"#),
            ("Negotiate, Basic realm=x", "negotiate[] basic[realm=x]"),
            (r#"Bearer realm="unterminated"#, "bearer[]"),
            ("realm=x", ""),
            ("", ""),
        ] {
            assert_eq!(shown(header), right, "{header}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(header in "\\PC{0,60}") {
            parse(&header);
        }

        #[test]
        fn nothing_like_a_header_panics(header in "[a-c=\", \\\\]{0,30}") {
            parse(&header);
        }
    }
}
