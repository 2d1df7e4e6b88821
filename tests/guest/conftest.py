from __future__ import annotations

from tests.guest.support import boot_guest, guest_image

__all__ = ["boot_guest", "guest_image"]
