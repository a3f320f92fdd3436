//! Opens a tunnel with the original's client library and serves it from a local port.
//!
//! ```text
//! tinytun-interop SERVER_URL http|tcp LOCAL_PORT [SUBDOMAIN|PORT [CONCURRENCY]]
//! ```
//!
//! Prints `ready URL` on standard output once the tunnel is open, then serves until
//! standard input ends or SIGTERM arrives (exit 0). A tunnel that cannot be opened is
//! exit 1, with the library's own words on standard error; one that the server ends is
//! exit 3. `-` as the fourth argument wants no particular name.

use std::{env, error::Error, io::Write, process::exit};

use tinytun::{Tunnel, TunnelStream, TunnelType};
use tokio::{
    io::{self, AsyncReadExt},
    net::TcpStream,
    signal::unix::{signal, SignalKind},
};

type Failure = Box<dyn Error + Send + Sync>;

struct Arguments {
    server: String,
    kind: TunnelType,
    local: u16,
    name: Option<String>,
    concurrency: u32,
}

fn arguments() -> Result<Arguments, Failure> {
    let mut given = env::args().skip(1);
    let mut next = |what: &str| given.next().ok_or(format!("{what} is missing"));
    Ok(Arguments {
        server: next("the server's URL")?,
        kind: next("the type")?.parse()?,
        local: next("the local port")?.parse()?,
        name: next("").ok().filter(|name| name != "-"),
        concurrency: next("").map_or(Ok(100), |number| number.parse())?,
    })
}

async fn open(wanted: Arguments) -> Result<Tunnel, Failure> {
    let builder = Tunnel::builder()
        .server_url(wanted.server)
        .max_concurrent_streams(wanted.concurrency);
    let builder = match wanted.kind {
        TunnelType::Http => builder.subdomain(wanted.name),
        TunnelType::Tcp => builder.port(wanted.name.map(|port| port.parse::<u16>()).transpose()?),
    };
    builder.tunnel_type(wanted.kind).listen().await
}

/// One visitor. If the service refuses, the stream is dropped, which the library turns
/// into RST_STREAM CANCEL after the 200 it has already sent.
async fn carry(mut stream: TunnelStream, local: u16) -> io::Result<()> {
    let mut service = TcpStream::connect(("127.0.0.1", local)).await?;
    io::copy_bidirectional(&mut stream, &mut service).await?;
    Ok(())
}

async fn serve(mut tunnel: Tunnel, local: u16) {
    while let Some(stream) = tunnel.accept().await {
        tokio::spawn(carry(stream, local));
    }
}

/// Standard input's end: whoever started this program is gone, or done with it.
async fn abandoned() -> io::Result<()> {
    let mut scratch = [0; 64];
    let mut input = io::stdin();
    while input.read(&mut scratch).await? > 0 {}
    Ok(())
}

async fn run() -> Result<i32, Failure> {
    let wanted = arguments()?;
    let local = wanted.local;
    let mut terminated = signal(SignalKind::terminate())?;
    let tunnel = open(wanted).await?;
    println!("ready {}", tunnel.proxy_url());
    std::io::stdout().flush()?;
    tokio::select! {
        () = serve(tunnel, local) => Ok(3),
        _ = terminated.recv() => Ok(0),
        _ = abandoned() => Ok(0),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    // exit() instead of a return: the runtime would wait for the blocking read of standard input.
    exit(run().await.unwrap_or_else(|error| {
        eprintln!("{error}");
        1
    }))
}
