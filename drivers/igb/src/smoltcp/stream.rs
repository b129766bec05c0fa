//! TCP connections.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use ::smoltcp::{
    iface::SocketHandle,
    socket::tcp::{RecvError, Socket, State},
    wire::IpEndpoint,
};
use futures::io::{AsyncRead, AsyncWrite};

use super::Stack;

/// A TCP connection of a [`Stack`]. Dropped, it is closed in order as long as the stack runs.
pub struct TcpStream {
    stack: Stack,
    handle: SocketHandle,
}

impl TcpStream {
    pub(super) fn new(stack: Stack, handle: SocketHandle) -> Self {
        Self { stack, handle }
    }

    pub(super) fn handle(&self) -> SocketHandle {
        self.handle
    }

    /// Lends smoltcp's socket to `f`, which must not use the stack itself.
    pub fn with<R>(&self, f: impl FnOnce(&mut Socket<'static>) -> R) -> R {
        self.stack.with_socket(self.handle, f)
    }

    /// The other end, while there is one.
    pub fn remote(&self) -> Option<IpEndpoint> {
        self.with(|socket| socket.remote_endpoint())
    }

    /// Waits until data can go both ways.
    pub(super) async fn established(&self, otherwise: io::ErrorKind) -> io::Result<()> {
        poll_fn(|cx| {
            self.with(|socket| {
                if socket.may_send() {
                    return Poll::Ready(Ok(()));
                }
                if !socket.is_open() {
                    return Poll::Ready(Err(otherwise.into()));
                }
                socket.register_send_waker(cx.waker());
                Poll::Pending
            })
        })
        .await
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.with(|socket| match socket.recv_slice(buf) {
            Ok(0) if !buf.is_empty() => {
                socket.register_recv_waker(cx.waker());
                Poll::Pending
            }
            Ok(read) => Poll::Ready(Ok(read)),
            Err(RecvError::Finished) => Poll::Ready(Ok(0)),
            Err(RecvError::InvalidState) => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        })
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|socket| match socket.send_slice(buf) {
            Ok(0) if !buf.is_empty() => {
                socket.register_send_waker(cx.waker());
                Poll::Pending
            }
            Ok(written) => Poll::Ready(Ok(written)),
            Err(_) => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        })
    }

    /// Nothing is held back.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Ends our direction, and waits until the other end has everything. What it sends can still be read.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|socket| {
            if matches!(socket.state(), State::Established | State::CloseWait | State::SynReceived) {
                socket.close();
            }
            match socket.state() {
                State::FinWait1 | State::Closing | State::LastAck => {
                    socket.register_send_waker(cx.waker());
                    Poll::Pending
                }
                _ => Poll::Ready(Ok(())),
            }
        })
    }
}

impl Drop for TcpStream {
    fn drop(&mut self) {
        self.stack.abandon(self.handle);
    }
}

impl std::fmt::Debug for TcpStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpStream").field("state", &self.with(|socket| socket.state())).finish_non_exhaustive()
    }
}
