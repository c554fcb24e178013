"""The words that emoji captions are put together from, language by language.

A further language is one more entry of `WORDS`, and its CLDR names in `objects.json`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """The words of one language that captions are put together from.

    Attributes:
        colours: the colour words, in the order of `drawing.COLOURS`.
        grounds: pattern ("plain", "striped", "dotted", "checked") -> background with a `{colour}` field.
        row, column: words for the first, middle and last place.
        counts: how two, three and four of a thing begin.
        picture, et: the words for "picture" and "and".
    """

    colours: tuple[str, ...]
    grounds: dict[str, str]
    row: tuple[str, ...] = ("", "", "")
    column: tuple[str, ...] = ("", "", "")
    counts: tuple[str, str, str] = ("2 × ", "3 × ", "4 × ")
    picture: str = ""
    et: str = ""


def _grounds(plain: str, striped: str, dotted: str, checked: str) -> dict[str, str]:
    return {"plain": plain, "gradient": plain, "striped": striped, "dotted": dotted, "checked": checked}


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split(", "))


WORDS: dict[str, Words] = {
    "en": Words(
        _listed("white, black, red, orange, yellow, green, blue, purple, pink, brown, grey"),
        _grounds(
            "a {colour} background",
            "a striped {colour} background",
            "a dotted {colour} background",
            "a checked {colour} background",
        ),
        counts=("two ", "three ", "four "),
    ),
    "vi": Words(
        _listed("trắng, đen, đỏ, cam, vàng, xanh lá cây, xanh lam, tím, hồng, nâu, xám"),
        _grounds("nền {colour}", "nền kẻ sọc {colour}", "nền chấm bi {colour}", "nền kẻ ô {colour}"),
        counts=("hai ", "ba ", "bốn "),
    ),
    "fr": Words(
        _listed("blanc, noir, rouge, orange, jaune, vert, bleu, violet, rose, marron, gris"),
        _grounds(
            "fond {colour}", "fond {colour} à rayures", "fond {colour} à pois", "fond {colour} à carreaux"
        ),
        row=_listed("à gauche, au milieu, à droite"),
        column=_listed("en haut, au milieu, en bas"),
        picture="image",
        et="et",
    ),
    "de": Words(
        _listed("weiß, schwarz, rot, orange, gelb, grün, blau, lila, rosa, braun, grau"),
        _grounds(
            "Hintergrund {colour}",
            "Hintergrund {colour} gestreift",
            "Hintergrund {colour} gepunktet",
            "Hintergrund {colour} kariert",
        ),
        row=_listed("links, in der Mitte, rechts"),
        column=_listed("oben, in der Mitte, unten"),
        picture="Bild",
        et="und",
    ),
    "es": Words(
        _listed("blanco, negro, rojo, naranja, amarillo, verde, azul, morado, rosa, marrón, gris"),
        _grounds(
            "fondo {colour}",
            "fondo {colour} a rayas",
            "fondo {colour} con lunares",
            "fondo {colour} a cuadros",
        ),
        row=_listed("a la izquierda, en el centro, a la derecha"),
        column=_listed("arriba, en el centro, abajo"),
        picture="imagen",
        et="y",
    ),
    "pt": Words(
        _listed("branco, preto, vermelho, laranja, amarelo, verde, azul, roxo, rosa, marrom, cinza"),
        _grounds(
            "fundo {colour}", "fundo {colour} listrado", "fundo {colour} de bolinhas", "fundo {colour} xadrez"
        ),
        row=_listed("à esquerda, no meio, à direita"),
        column=_listed("em cima, no meio, embaixo"),
        picture="imagem",
        et="e",
    ),
    "id": Words(
        _listed("putih, hitam, merah, oranye, kuning, hijau, biru, ungu, merah muda, cokelat, abu-abu"),
        _grounds(
            "latar {colour}",
            "latar {colour} bergaris",
            "latar {colour} berbintik",
            "latar {colour} kotak-kotak",
        ),
        row=_listed("di kiri, di tengah, di kanan"),
        column=_listed("di atas, di tengah, di bawah"),
        counts=("dua ", "tiga ", "empat "),
        picture="gambar",
        et="dan",
    ),
    "tr": Words(
        _listed("beyaz, siyah, kırmızı, turuncu, sarı, yeşil, mavi, mor, pembe, kahverengi, gri"),
        _grounds(
            "{colour} arka plan",
            "çizgili {colour} arka plan",
            "puantiyeli {colour} arka plan",
            "kareli {colour} arka plan",
        ),
        row=_listed("solda, ortada, sağda"),
        column=_listed("üstte, ortada, altta"),
        counts=("iki ", "üç ", "dört "),
        picture="resim",
        et="ve",
    ),
}

LANGUAGES: tuple[str, ...] = tuple(WORDS)
