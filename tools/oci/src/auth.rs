// SPDX-License-Identifier: GPL-2.0

//! Who asks: answers a registry's challenges with a password or with a token bought for it, and renews tokens in time.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use base64::{prelude::BASE64_STANDARD, Engine};
use serde::Deserialize;
use ureq::http::{HeaderMap, Method};

use crate::{
    challenge,
    credentials::{Credentials, Login},
    error::{Error, Kind, Result},
    http::{Call, Content, Http},
    retry::{Backoff, Failure},
    url::{encode, is_loopback, Url},
};

/// Most bytes of the answer that holds a token.
const MAX_TOKEN_BYTES: u64 = 1 << 20;
/// Life of a token that does not say how long it lives.
const TOKEN_LIFE: u64 = 60;

/// Answers the challenges of one registry.
#[derive(Debug, Default)]
pub struct Auth {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    demand: Option<Demand>,
    credentials: Option<Option<Credentials>>,
    tokens: HashMap<String, Token>,
}

#[derive(Clone, Debug)]
enum Demand {
    Basic,
    Bearer { realm: Url, service: Option<String> },
}

struct Token {
    value: String,
    renew: Instant,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token")
    }
}

impl Auth {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The header for a request that needs `scope`, as far as it is known what the registry demands. `find` gives
    /// the credentials.
    ///
    /// # Errors
    ///
    /// No token is given, or the credentials cannot be read.
    pub fn header(
        &self,
        http: &Http,
        scope: &str,
        find: impl FnOnce() -> Result<Option<Credentials>>,
    ) -> Result<Option<String>> {
        // Held while a token is bought: all others that need one wait for it.
        let mut state = self.lock();
        let Some(demand) = state.demand.clone() else {
            return Ok(None);
        };
        if state.credentials.is_none() {
            state.credentials = Some(find()?);
        }
        let credentials = state.credentials.clone().flatten();
        match demand {
            Demand::Basic => Ok(credentials.and_then(|credentials| match credentials.login {
                Login::Basic { user, password } => Some(basic(&user, &password)),
                Login::Identity { .. } => None,
            })),
            Demand::Bearer { realm, service } => {
                if let Some(token) = state
                    .tokens
                    .get(scope)
                    .filter(|token| Instant::now() < token.renew)
                {
                    return Ok(Some(format!("Bearer {}", token.value)));
                }
                let token = buy(
                    http,
                    &realm,
                    service.as_deref(),
                    scope,
                    credentials.as_ref(),
                )?;
                let header = format!("Bearer {}", token.value);
                state.tokens.insert(scope.to_owned(), token);
                Ok(Some(header))
            }
        }
    }

    /// Learns from an answer with the status 401 to a request that was sent with `used`. Whether it is worth to send the
    /// request again.
    pub fn learn(&self, headers: &HeaderMap, asked: &Url, scope: &str, used: Option<&str>) -> bool {
        let challenges: Vec<_> = headers
            .get_all("www-authenticate")
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(challenge::parse)
            .collect();
        let bearer = challenges
            .iter()
            .filter(|challenge| challenge.scheme == "bearer")
            .find_map(|challenge| {
                let realm = asked.join(challenge.parameters.get("realm")?)?;
                // A password is not sent in the clear where the registry itself is encrypted.
                let safe = realm.is_https() || !asked.is_https() || is_loopback(realm.authority());
                let service = challenge.parameters.get("service").cloned();
                safe.then_some(Demand::Bearer { realm, service })
            });
        let basic = || {
            challenges
                .iter()
                .any(|challenge| challenge.scheme == "basic")
                .then_some(Demand::Basic)
        };
        let mut state = self.lock();
        let used_token = used.and_then(|used| used.strip_prefix("Bearer "));
        if state
            .tokens
            .get(scope)
            .is_some_and(|token| Some(token.value.as_str()) == used_token)
        {
            state.tokens.remove(scope);
        }
        state.demand = bearer.or_else(basic);
        match &state.demand {
            None => false,
            Some(Demand::Basic) => used.is_none(),
            Some(Demand::Bearer { .. }) => true,
        }
    }

    /// Who one is for the registry, for messages.
    pub fn who(&self) -> String {
        match self.lock().credentials.as_ref().and_then(Option::as_ref) {
            Some(credentials) => format!(
                "as {} (credentials from {})",
                credentials.login.user(),
                credentials.from
            ),
            None => "without credentials".to_owned(),
        }
    }
}

/// The header for a name and a password.
pub fn basic(user: &str, password: &str) -> String {
    format!(
        "Basic {}",
        BASE64_STANDARD.encode(format!("{user}:{password}"))
    )
}

/// Buys a token for `scope`.
fn buy(
    http: &Http,
    realm: &Url,
    service: Option<&str>,
    scope: &str,
    credentials: Option<&Credentials>,
) -> Result<Token> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<u64>,
    }
    let scopes: Vec<&str> = scope.split(' ').filter(|scope| !scope.is_empty()).collect();
    let mut form = String::new();
    let mut url = realm.clone();
    let mut authorization = None;
    match credentials.map(|credentials| &credentials.login) {
        Some(Login::Identity { token }) => {
            form = format!(
                "grant_type=refresh_token&client_id=ovbd&refresh_token={}",
                encode(token)
            );
            form.extend(service.map(|service| format!("&service={}", encode(service))));
            form.push_str(&format!("&scope={}", encode(&scopes.join(" "))));
        }
        login => {
            if let Some(Login::Basic { user, password }) = login {
                authorization = Some(basic(user, password));
                url = url.with("account", user);
            }
            if let Some(service) = service {
                url = url.with("service", service);
            }
            for scope in &scopes {
                url = url.with("scope", scope);
            }
        }
    }
    let call = Call {
        method: if form.is_empty() {
            Method::GET
        } else {
            Method::POST
        },
        url,
        headers: if form.is_empty() {
            vec![]
        } else {
            vec![(
                "Content-Type",
                "application/x-www-form-urlencoded".to_owned(),
            )]
        },
        authorization,
        content: if form.is_empty() {
            Content::None
        } else {
            Content::Bytes(form.as_bytes())
        },
        patience: http.options().stall,
    };
    let asked = Instant::now();
    let options = http.options();
    Backoff::new(options.retries, &http.stop).run(
        |_, _| (),
        || {
            let mut answer = http.run(&call)?;
            if !answer.status.is_success() {
                return Err(match http.refusal(&call, &mut answer) {
                    Failure::Final(error) if error.kind() == Kind::Denied => {
                        let who = match credentials {
                            Some(found) => format!(
                                "as {} (credentials from {})",
                                found.login.user(),
                                found.from
                            ),
                            None => "without credentials".to_owned(),
                        };
                        let what = format!("no token {who}: {}", error.what());
                        Failure::Final(
                            http.error(&call, Kind::Denied, &what)
                                .with_status(answer.status.as_u16()),
                        )
                    }
                    other => other,
                });
            }
            let wrong = |what: &str| Failure::Final(http.error(&call, Kind::Invalid, what));
            let text = answer
                .read(MAX_TOKEN_BYTES)
                .map_err(|error| {
                    Failure::Again(
                        http.error(&call, Kind::Temporary, &crate::error::message(&error)),
                        None,
                    )
                })?
                .ok_or_else(|| wrong("a token of more than 1 MiB"))?;
            let answer: Answer =
                serde_json::from_slice(&text).map_err(|_| wrong("an answer that is no token"))?;
            let value = answer
                .token
                .or(answer.access_token)
                .filter(|value| is_header_value(value));
            let life = Duration::from_secs(answer.expires_in.unwrap_or(TOKEN_LIFE).min(1 << 20));
            Ok(Token {
                value: value.ok_or_else(|| wrong("an answer without a token"))?,
                renew: asked + life.mul_f64(0.75),
            })
        },
    )
}

fn is_header_value(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|c| c.is_ascii_graphic())
}

/// An error for who may not do something.
pub fn denied(error: Error, subject: &str, action: &str, who: &str) -> Error {
    let status = error.status().unwrap_or(403);
    Error::new(
        Kind::Denied,
        subject,
        format!("not allowed to {action} {who}: {}", error.what()),
    )
    .with_status(status)
}
