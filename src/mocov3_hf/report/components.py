"""Principal components of patch features, as colours.

Legend: B images, h w grid, D width.
"""

import torch


class PatchStatistics:
    """
    Mean and covariance of the patches of any number of images, in float64, without keeping them.

    Args:
        width: `D`.
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, maps: torch.Tensor) -> None:
        """Take in (B, h, w, D), by the update of Chan et al. (1979): no difference of large squares."""
        patches = maps.reshape(-1, maps.shape[-1]).double()
        mean = patches.mean(dim=0)
        centred, shift, count = patches - mean, mean - self.mean, len(patches)
        total = self.count + count
        self.scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def components(self, number: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The directions of largest variance (number, D), each with its largest entry positive, and the variances
        (number,), both float64. Fewer where D is smaller.
        """
        variances, vectors = torch.linalg.eigh(self.scatter / self.count)
        directions = vectors.T.flip(0)[:number]
        largest = directions.abs().argmax(dim=1, keepdim=True)
        return directions * directions.gather(1, largest).sign(), variances.flip(0)[:number].clamp(min=0)

    def explained(self, number: int = 3) -> float:
        """Share of the variance in the first components."""
        total = self.scatter.trace() / self.count
        return float(self.components(number)[1].sum() / total) if total > 0 else 0.0


def component_colors(maps: torch.Tensor, statistics: PatchStatistics) -> torch.Tensor:
    """
    The first three components of every patch as red, green and blue: the mean is mid grey, two standard deviations
    (over all images of the statistics) to either side reach black and full colour.

    Args:
        maps: (B, h, w, D).

    Returns:
        float32 (B, h, w, 3) between 0 and 1; a component without variance is grey.
    """
    directions, variances = statistics.components()
    projected = (maps.double() - statistics.mean) @ directions.T
    deviation = variances.sqrt()
    usable = deviation > 1e-9 * max(float(deviation.max()), 1e-30)
    scaled = torch.where(usable, projected / (4 * deviation.clamp(min=1e-30)), 0.0)
    colors = maps.new_full((*maps.shape[:3], 3), 0.5, dtype=torch.float64)
    colors[..., : scaled.shape[-1]] += scaled
    return colors.clamp(0, 1).float()
