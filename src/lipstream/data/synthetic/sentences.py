"""Things to say: templates over word lists in English, and short sentences in other languages."""

from __future__ import annotations

import numpy as np


def _split(text: str) -> list[str]:
    return text.split("|")


_WHO = _split(
    "my mother|the baker|Bob|Emma|our family|the farmer|Vivian|Fabio|a famous poet|the big brown bear|"
    "everybody|Maria|my best friend|the waiter|Paul|nobody|the pilot|Mister Boom|a happy puppy|"
    "the whole village"
)
_VERB = _split(
    "bought|moved|found|brought|broke|painted|remembered|forgot|served|published|borrowed|washed|loved|"
    "wrapped|carried|saved|opened|promised|measured|photographed"
)
_WHAT = _split(
    "five blue umbrellas|a fabulous apple pie|the purple balloon|every empty bottle|my favourite movie|"
    "a map of Bavaria|four fresh muffins|the bamboo table|a pair of warm mittens|some very good advice|"
    "the paper boat|a box of problems|both maps|the old radio|a huge watermelon|the cheap shoes|"
    "the yellow cabbage|an awful lot of bubbles|two pounds of butter|the final version"
)
_WHERE = _split(
    "before breakfast|in the family van|on a beautiful beach|at the opera|above the baker's shop|"
    "every Wednesday|on the way home from Vermont|in the middle of the harbour|without any help|"
    "from time to time|for a million reasons|behind the big barn|just for fun|after the meeting|"
    "on Monday morning|in October"
)
_PHRASES = _split(
    "Hello, how are you today?|What a wonderful idea!|I am afraid that is all we have.|Please be patient.|"
    "Oh, wow!|Maybe, maybe not.|Can you hear me?|Pam packed a backpack.|Five of them have left.|"
    "We were away a year ago.|Mama made me do it.|That is simply not possible.|"
    "You have to open your mouth wide and say aah.|Thank you very much for coming.|"
    "Peter picked a peck of pickled peppers.|Why not?|The fog above the valley vanished before five.|"
    "Both of us believe you.|No, no, no!|He has a lot of hot coffee in the pot.|Bye bye for now.|"
    "In my opinion, this problem will be solved by the end of March.|Few people ever move that far.|"
    "Is it a bird, or is it a plane?|The weather will be mild, with a bit of wind in the afternoon.|"
    "I would like to talk about numbers.|Someone must have been lying about him.|"
    "One, two, three, four, five, six, seven.|It was the best film of the summer.|Please stop bumping my arm."
)
_FOREIGN: dict[str, list[str]] = {
    "de": _split(
        "Guten Morgen, wie geht es Ihnen?|Meine Mutter backt am Freitag immer Apfelkuchen.|"
        "Wir haben fünf bunte Ballons gekauft.|Bitte öffnen Sie das Fenster.|"
        "Vielleicht kommen wir am Abend vorbei.|Das Wetter war gestern ziemlich schlecht.|"
        "Ich möchte über Zahlen sprechen.|Papa fährt mit dem Fahrrad zum Bahnhof.|"
        "Übermorgen blühen die Bäume am Wasser.|Haben Sie vielen Dank für alles."
    ),
    "fr": _split(
        "Bonjour, comment allez-vous aujourd'hui?|Ma mère a acheté du pain et du fromage.|"
        "Il fait vraiment beau ce matin.|Nous aimons beaucoup la vie au bord de la mer.|"
        "Pouvez-vous ouvrir la porte, s'il vous plaît?|Le petit bateau bleu part demain.|"
        "Papa prépare une bonne soupe aux pommes.|Je voudrais vous parler de mon village.|"
        "Merci beaucoup pour votre visite."
    ),
    "es": _split(
        "Buenos días, me llamo Pablo.|Mi mamá prepara una buena sopa.|Vamos a la playa por la mañana.|"
        "Hay que abrir bien la boca para hablar.|El barco blanco viene mañana por la tarde.|"
        "Muchas gracias por su ayuda.|No me acuerdo de la palabra.|Los pájaros volaban sobre el mar."
    ),
    "it": _split(
        "Buongiorno, come va oggi?|La mamma prepara un buon piatto di pasta.|Vorrei parlare di musica.|"
        "Il bambino beve un bicchiere di acqua.|Abbiamo visto un film molto bello.|Per favore, apri la porta.|"
        "Domani mattina partiamo per Palermo.|Grazie mille per la bella serata."
    ),
    "pt": _split(
        "Bom dia, como está a família?|A minha mãe comprou pão e fruta.|Vamos falar de uma coisa importante.|"
        "O barco azul parte amanhã de manhã.|Muito obrigado pela sua ajuda.|Eu preciso de uma boa ideia.|"
        "O pai abre a porta da varanda."
    ),
    "hi": _split(
        "नमस्ते, आप कैसे हैं?|मेरी माँ बाज़ार से फल लाई।|आज मौसम बहुत अच्छा है।|मुझे आपसे बात करनी है।|"
        "पापा और बाबा बाग में बैठे हैं।|बहुत बहुत धन्यवाद।"
    ),
    "nl": _split(
        "Goedemorgen, hoe gaat het met u?|Mijn moeder bakt een appeltaart.|Wij fietsen vaak naar het water.|"
        "Mag ik even met u praten?|Papa en mama wonen boven de winkel.|Bedankt voor uw bezoek."
    ),
    "pl": _split(
        "Dzień dobry, jak się pan ma?|Moja mama piecze dobry chleb.|Bardzo proszę otworzyć okno.|"
        "Wczoraj była piękna pogoda.|Jutro pojedziemy nad morze.|Dziękuję bardzo za pomoc."
    ),
}
LANGUAGES = tuple(_FOREIGN)


def sentence(rng: np.random.Generator, language: str = "en") -> str:
    """One sentence of a language: `en` or one of `LANGUAGES`."""
    if language != "en":
        options = _FOREIGN[language]
        return options[int(rng.integers(len(options)))]
    draw = rng.random()
    if draw < 0.35:
        return _PHRASES[int(rng.integers(len(_PHRASES)))]

    def pick(words: list[str]) -> str:
        return words[int(rng.integers(len(words)))]

    text = f"{pick(_WHO)} {pick(_VERB)} {pick(_WHAT)}"
    if draw < 0.8:
        text += f" {pick(_WHERE)}"
    if draw > 0.9:
        text += f", but {pick(_WHO)} {pick(_VERB)} {pick(_WHAT)}"
    return text[0].upper() + text[1:] + "."
